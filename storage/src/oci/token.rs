//! Answers to a registry's challenge: basic logins, and bearer tokens fetched for a scope.
//!
//! ```text
//!   request ──▶ 401 + WWW-Authenticate ──▶ renew: token from the realm ──▶ request again
//!      ▲                                        │
//!      └── header(): the token kept for the scope, renewed shortly before it expires
//! ```
//!
//! Invariants: one token request at a time for one registry, others wait and share its
//! result; credentials go to the registry and to the realm it names, the latter never in
//! clear unless the registry itself is spoken to in clear.

mod request;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Request, StatusCode};

use self::request::{TokenRequest, parse_token};
use super::auth::{AuthFiles, Credentials, Secret};
use super::challenge::Challenge;
use super::reference::is_loopback;
use crate::backend::ReadContext;
use crate::backend::http::{Http, shown};
use crate::backend::retry::{Failure, within};
use crate::{Error, ErrorKind, Result};

/// Life of a token whose server does not say (contract section 2.4).
const DEFAULT_LIFE: Duration = Duration::from_secs(600);
/// Tokens are renewed this long before they expire (contract section 2.4).
const RENEW_BEFORE: Duration = Duration::from_secs(20);
/// A refusal says nothing of the login while requests of its scope are answered otherwise: some places of a registry
/// refuse everybody.
const ACCEPTANCE_HOLDS: Duration = Duration::from_secs(60);
/// A login that was refused is not presented again for so long: who asks for many chunks at once would lock the account.
const REFUSAL_HOLDS: Duration = Duration::from_secs(10);
/// A token answer is a few kilobytes.
const MAX_ANSWER_SIZE: u64 = 1 << 20;

/// Where logins come from.
#[derive(Clone, Debug)]
pub enum Login {
    /// These files, read when a registry first asks, and again when it refuses what they had.
    Files(AuthFiles),
    /// Given by configuration.
    Fixed(Credentials),
}

/// What a request does to which repository: the scope of its token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    repository: String,
    push: bool,
    delete: bool,
    mount_from: Option<String>,
}

impl Access {
    /// Reading from `repository`.
    pub fn pull(repository: impl Into<String>) -> Self {
        Self { repository: repository.into(), push: false, delete: false, mount_from: None }
    }

    /// Reading from and writing to `repository`.
    pub fn push(repository: impl Into<String>) -> Self {
        Self { push: true, ..Self::pull(repository) }
    }

    /// Deleting manifests of `repository`.
    pub fn delete(repository: impl Into<String>) -> Self {
        Self { delete: true, ..Self::push(repository) }
    }

    /// Also reading from another repository of the registry, to mount its blobs.
    #[must_use]
    pub fn mounting_from(mut self, repository: impl Into<String>) -> Self {
        self.mount_from = Some(repository.into());
        self
    }

    fn scopes(&self) -> Vec<String> {
        let actions = match (self.push, self.delete) {
            (_, true) => "pull,push,delete",
            (true, false) => "pull,push",
            (false, false) => "pull",
        };
        let mut scopes = vec![format!("repository:{}:{actions}", self.repository)];
        scopes.extend(self.mount_from.iter().map(|from| format!("repository:{from}:pull")));
        scopes
    }
}

#[derive(Clone, Debug)]
struct Token {
    header: Secret,
    expires: Instant,
    renew: Instant,
}

/// A login that was refused.
#[derive(Debug)]
struct Refusal {
    login: Credentials,
    at: Instant,
    error: Error,
}

#[derive(Debug)]
struct State {
    login: Login,
    /// Logins already looked up in files, by repository; until they are refused.
    logins: HashMap<String, Credentials>,
    /// By scope, the last one.
    refusals: HashMap<Access, Refusal>,
    /// When a request was last answered with something else than a refusal, by scope.
    accepted: HashMap<Access, Instant>,
    /// When files were last asked again because of a 403, by repository.
    reconsidered: HashMap<String, Instant>,
    /// Configured token, used until the registry refuses it.
    given: Option<Secret>,
    /// What the registry asked for last.
    challenge: Option<Challenge>,
    tokens: HashMap<Access, Token>,
    /// Counts hot changes, so that a token fetched with an old login is not kept.
    generation: u64,
}

/// Logins and tokens for one registry.
#[derive(Debug)]
pub struct Authenticator {
    http: Http,
    host: String,
    /// The registry itself is spoken to without TLS now, so its token server may be, too. Relaxed, as the client's.
    in_clear: Arc<AtomicBool>,
    /// Short, never held across an await.
    state: Mutex<State>,
    /// Held by the one who asks the token server; taken before `state`.
    flight: tokio::sync::Mutex<()>,
}

impl Authenticator {
    /// For the registry that users name `host`.
    /// While `in_clear` is true, logins may go to token servers without TLS.
    pub fn new(
        http: Http,
        host: &str,
        login: Login,
        given: Option<Secret>,
        in_clear: Arc<AtomicBool>,
    ) -> Self {
        let given = given.map(|token| Secret::new(format!("Bearer {}", token.expose())));
        let state = State {
            login,
            logins: HashMap::new(),
            refusals: HashMap::new(),
            accepted: HashMap::new(),
            reconsidered: HashMap::new(),
            given,
            challenge: None,
            tokens: HashMap::new(),
            generation: 0,
        };
        let (state, flight) = (Mutex::new(state), tokio::sync::Mutex::new(()));
        Self { http, host: host.to_owned(), in_clear, state, flight }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // No code panics while holding it; were it so, every field is still valid.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Replaces the login from now on; tokens made with the old one are dropped.
    pub fn set_credentials(&self, credentials: Credentials) {
        let mut state = self.state();
        state.login = Login::Fixed(credentials);
        state.logins.clear();
        state.refusals.clear();
        state.accepted.clear();
        state.given = None;
        state.tokens.clear();
        state.generation += 1;
    }

    /// The header to send with a request for `access`, fetched or renewed if that is due.
    ///
    /// # Errors
    /// Those of the token server; `TimedOut`, `Cancelled`.
    pub async fn header(
        &self,
        access: &Access,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let (challenge, token) = {
            let state = self.state();
            if state.given.is_some() {
                return Ok(state.given.clone());
            }
            match &state.challenge {
                None => return Ok(None),
                Some(challenge) => (challenge.clone(), state.tokens.get(access).cloned()),
            }
        };
        let now = Instant::now();
        let _flight = match &token {
            Some(token) if now < token.renew => return Ok(Some(token.header.clone())),
            // Still good: one renews it, the others go on with it.
            Some(token) if now < token.expires => match self.flight.try_lock() {
                Ok(guard) => guard,
                Err(_) => return Ok(Some(token.header.clone())),
            },
            _ => self.take_flight(context).await?,
        };
        // Whoever held the flight before may have brought a token.
        if let Some(fresh) = self.state().tokens.get(access).filter(|t| Instant::now() < t.renew) {
            return Ok(Some(fresh.header.clone()));
        }
        match (self.log_in(access, &challenge, None, context).await, token) {
            (Ok(header), _) => Ok(header),
            (Err(failure), Some(token)) if Instant::now() < token.expires => {
                tracing::warn!(error = %failure.error, "a token could not be renewed yet, using the old one");
                Ok(Some(token.header))
            }
            (Err(failure), _) => Err(failure),
        }
    }

    /// A better header after the registry refused `used` with 401 and these challenges;
    /// `None` if there is nothing better to offer.
    ///
    /// # Errors
    /// Those of the token server; `TimedOut`, `Cancelled`; `Unsupported`: a challenge of
    /// another kind.
    pub async fn renew(
        &self,
        access: &Access,
        challenges: Vec<Challenge>,
        used: Option<&Secret>,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let _flight = self.take_flight(context).await?;
        {
            let mut state = self.state();
            if used.is_some() && state.given.as_ref() == used {
                state.given = None;
            }
            if let Some(token) = state.tokens.get(access) {
                if Some(&token.header) != used {
                    return Ok(Some(token.header.clone()));
                }
                state.tokens.remove(access);
            }
        }
        // A user with a password can answer both kinds, anybody else only Bearer.
        let bearer = challenges.iter().find(|c| matches!(c, Challenge::Bearer { .. }));
        let basic = challenges.iter().find(|c| matches!(c, Challenge::Basic));
        let Some(challenge) = bearer.or(basic) else {
            let why = format!("registry {} asks for a login this client does not know", self.host);
            return Err(Error::new(ErrorKind::Unsupported, why).into());
        };
        self.state().challenge = Some(challenge.clone());
        self.log_in(access, challenge, used, context).await
    }

    /// Another header after the registry answered 403 to `used`, which some say to a login that has expired: `None`
    /// unless files and helpers have another one by now. They are asked once in a while.
    ///
    /// # Errors
    /// As [`Authenticator::renew`].
    pub async fn reconsider(
        &self,
        access: &Access,
        used: &Secret,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let _flight = self.take_flight(context).await?;
        let (challenge, old) = {
            let mut state = self.state();
            // Only logins from files are here.
            let old = state.logins.get(&access.repository).cloned();
            let (Some(challenge), Some(old)) = (state.challenge.clone(), old) else { return Ok(None) };
            let known = match challenge {
                Challenge::Basic => old.basic_header(),
                Challenge::Bearer { .. } => state.tokens.get(access).map(|token| token.header.clone()),
            };
            // Somebody else was here before.
            if known.as_ref().is_some_and(|known| known != used) {
                return Ok(known);
            }
            let last = state.reconsidered.insert(access.repository.clone(), Instant::now());
            if let Some(at) = last.filter(|at| at.elapsed() < REFUSAL_HOLDS) {
                state.reconsidered.insert(access.repository.clone(), at);
                return Ok(None);
            }
            (challenge, old)
        };
        match self.look_again(access, &old, context).await {
            Some(login) => {
                self.state().tokens.remove(access);
                self.obtain(access, &challenge, &login, Some(used), context).await
            }
            None => Ok(None),
        }
    }

    /// The registry answers requests for `access` as they are made now.
    pub fn note_acceptance(&self, access: &Access) {
        let now = Instant::now();
        let mut state = self.state();
        match state.accepted.get_mut(access) {
            Some(last) => *last = now,
            None => drop(state.accepted.insert(access.clone(), now)),
        }
    }

    /// The registry refuses what was made of the login at hand: it is not presented again for a while.
    pub fn note_refusal(&self, access: &Access, error: &Error) {
        let login = {
            let state = self.state();
            if state.accepted.get(access).is_some_and(|at| at.elapsed() < ACCEPTANCE_HOLDS) {
                return;
            }
            match &state.login {
                Login::Fixed(login) => Some(login.clone()),
                Login::Files(_) => state.logins.get(&access.repository).cloned(),
            }
        };
        if let Some(login) = login {
            self.keep_refusal(access, login, error.clone());
        }
    }

    fn keep_refusal(&self, access: &Access, login: Credentials, error: Error) {
        let mut state = self.state();
        state.refusals.retain(|_, refusal| refusal.at.elapsed() < REFUSAL_HOLDS);
        state.refusals.insert(access.clone(), Refusal { login, at: Instant::now(), error });
    }

    /// The header that answers `challenge` with the login at hand or, if that is refused, with the one that files and
    /// helpers have by now. `None`: there is none beside `used`. The caller holds the flight.
    async fn log_in(
        &self,
        access: &Access,
        challenge: &Challenge,
        used: Option<&Secret>,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let login = self.credentials(access, context).await?;
        let refusal = {
            let state = self.state();
            let last = state.refusals.get(access);
            let last = last.filter(|last| last.login == login && last.at.elapsed() < REFUSAL_HOLDS);
            last.map(|last| last.error.clone())
        };
        if let Some(error) = refusal {
            return Err(error.context("refused a moment ago, and not tried again yet").into());
        }
        let first = self.obtain(access, challenge, &login, used, context).await;
        if !is_refused(&first) {
            return first;
        }
        let (login, result) = match self.look_again(access, &login, context).await {
            Some(newer) => {
                let second = self.obtain(access, challenge, &newer, used, context).await;
                (newer, second)
            }
            None => (login, first),
        };
        if let Some(failure) = result.as_ref().err().filter(|_| is_refused(&result)) {
            self.keep_refusal(access, login, failure.error.clone());
        }
        result
    }

    /// What files and helpers say by now, if it is something else than `old`.
    async fn look_again(
        &self,
        access: &Access,
        old: &Credentials,
        context: &ReadContext,
    ) -> Option<Credentials> {
        {
            let mut state = self.state();
            if matches!(state.login, Login::Fixed(_)) {
                return None;
            }
            state.logins.remove(&access.repository);
        }
        let found = self.credentials(access, context).await;
        let found =
            found.inspect_err(|error| tracing::warn!(%error, "the login could not be looked up again"));
        found.ok().filter(|found| found != old)
    }

    async fn take_flight(
        &self,
        context: &ReadContext,
    ) -> std::result::Result<tokio::sync::MutexGuard<'_, ()>, Failure> {
        let what = format!("log in to {}", self.host);
        within(context, &what, async { Ok(self.flight.lock().await) }).await
    }

    /// The login for a repository, from the files at the first time.
    async fn credentials(&self, access: &Access, context: &ReadContext) -> Result<Credentials> {
        let files = {
            let state = self.state();
            match (&state.login, state.logins.get(&access.repository)) {
                (Login::Fixed(credentials), _) | (_, Some(credentials)) => return Ok(credentials.clone()),
                (Login::Files(files), None) => files.clone(),
            }
        };
        let (host, repository) = (self.host.clone(), access.repository.clone());
        let what = format!("look up the login for {}", self.host);
        let found = within(context, &what, async {
            tokio::task::spawn_blocking(move || files.lookup(&host, &repository))
                .await
                .map_err(|e| Error::new(ErrorKind::Io, "look up a login").with_source(e))?
        })
        .await?;
        let mut state = self.state();
        if matches!(state.login, Login::Files(_)) {
            state.logins.insert(access.repository.clone(), found.clone());
        }
        Ok(found)
    }

    /// Makes or fetches the header that answers `challenge` with `login`; `None`: it is no other than `used`, or there
    /// is none. The caller holds the flight.
    async fn obtain(
        &self,
        access: &Access,
        challenge: &Challenge,
        login: &Credentials,
        used: Option<&Secret>,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let generation = self.state().generation;
        let (header, life) = match (challenge, login) {
            (_, Credentials::RegistryToken(token)) => {
                let header = Secret::new(format!("Bearer {}", token.expose()));
                if Some(&header) == used {
                    return Ok(None);
                }
                (header, DEFAULT_LIFE)
            }
            (Challenge::Basic, login) => {
                return Ok(login.basic_header().filter(|header| Some(header) != used));
            }
            (Challenge::Bearer { realm, service, scope }, login) => {
                let mut scopes = access.scopes();
                // A registry that asks for something else than this client expects is believed.
                if let Some(asked) = scope {
                    let resource = |s: &str| s.rsplit_once(':').map(|(name, _)| name.to_owned());
                    let known: Vec<_> = scopes.iter().map(|s| resource(s)).collect();
                    let more = asked.split(' ').filter(|s| !s.is_empty() && !known.contains(&resource(s)));
                    scopes.extend(more.map(str::to_owned).collect::<Vec<_>>());
                }
                let ask = TokenRequest { realm, service: service.as_deref(), scopes: &scopes };
                self.fetch(&ask, login, context).await?
            }
        };
        let now = Instant::now();
        let renew = now + life.saturating_sub(RENEW_BEFORE.min(life / 4));
        let mut state = self.state();
        if state.generation == generation {
            state.tokens.insert(access.clone(), Token { header: header.clone(), expires: now + life, renew });
        }
        Ok(Some(header))
    }

    /// Asks the token server: with a form if there is something to present, else (and as
    /// the fallback for servers without that) with a query.
    async fn fetch(
        &self,
        ask: &TokenRequest<'_>,
        credentials: &Credentials,
        context: &ReadContext,
    ) -> std::result::Result<(Secret, Duration), Failure> {
        let open = ask.realm.scheme() == "http" && !ask.realm.host_str().is_some_and(is_loopback);
        if open && !self.in_clear.load(Ordering::Relaxed) && *credentials != Credentials::Anonymous {
            let why = format!("registry {} wants its login sent in clear to {}", self.host, shown(ask.realm));
            return Err(Error::new(ErrorKind::Denied, why).into());
        }
        if let Some(form) = ask.form(credentials) {
            let mut request = Request::new(Method::POST, ask.realm.clone());
            request
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            *request.body_mut() = Some(form.into());
            let answer = self.http.send(request, context).await?;
            if answer.status() == StatusCode::OK {
                return parse_token(ask.realm, &answer.bytes(MAX_ANSWER_SIZE, context).await?);
            }
            // Only a login by password has another way to be presented. A server that is asked
            // too often already is not asked twice.
            if credentials.basic_header().is_none() || answer.status() == StatusCode::TOO_MANY_REQUESTS {
                return Err(self.refused(answer.into_failure(&self.host, context).await));
            }
        }
        let mut request = Request::new(Method::GET, ask.query_url());
        if let Some(basic) = credentials.basic_header() {
            request.headers_mut().insert(AUTHORIZATION, header_value(&basic)?);
        }
        let answer = self.http.send(request, context).await?;
        if answer.status() != StatusCode::OK {
            return Err(self.refused(answer.into_failure(&self.host, context).await));
        }
        parse_token(ask.realm, &answer.bytes(MAX_ANSWER_SIZE, context).await?)
    }

    fn refused(&self, failure: Failure) -> Failure {
        let error = failure.error.context(format_args!("token for registry {}", self.host));
        Failure { error, ..failure }
    }
}

/// True if a login was tried in vain, as far as the answer tells.
fn is_refused(result: &std::result::Result<Option<Secret>, Failure>) -> bool {
    match result {
        Ok(header) => header.is_none(),
        // 401, 403; 400.
        Err(failure) => matches!(failure.error.kind(), ErrorKind::Denied | ErrorKind::Invalid),
    }
}

/// A header value that libraries do not log.
///
/// # Errors
/// `Invalid`: the secret has characters that no header can carry.
pub fn header_value(secret: &Secret) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(secret.expose()).map_err(|_| {
        Error::new(ErrorKind::Invalid, "a login has characters that no HTTP header can carry")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests;
