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

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Request, StatusCode, Url};
use serde::Deserialize;

use super::auth::{AuthFiles, Credentials, Secret};
use super::challenge::Challenge;
use super::reference::is_loopback;
use crate::backend::ReadContext;
use crate::backend::http::{Http, shown};
use crate::backend::retry::{Failure, within};
use crate::{Error, ErrorKind, Result};

/// How this client names itself to token servers (the contract's client id).
const CLIENT_ID: &str = "nydus-registry-client";
/// Life of a token whose server does not say (contract section 2.4).
const DEFAULT_LIFE: Duration = Duration::from_secs(600);
/// Shorter lives are taken for this one, as docker does: servers say 0 and mean nothing by it.
/// A token that is over sooner is answered with 401 and renewed.
const MIN_LIFE: Duration = Duration::from_secs(60);
/// Longer lives are cut to this.
const MAX_LIFE: Duration = Duration::from_secs(86_400);
/// Tokens are renewed this long before they expire (contract section 2.4).
const RENEW_BEFORE: Duration = Duration::from_secs(20);
/// A token answer is a few kilobytes.
const MAX_ANSWER_SIZE: u64 = 1 << 20;

/// Where logins come from.
#[derive(Clone, Debug)]
pub enum Login {
    /// These files, read when a registry first asks.
    Files(AuthFiles),
    /// Given by configuration.
    Fixed(Credentials),
}

/// What a request does to which repository: the scope of its token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    repository: String,
    push: bool,
    mount_from: Option<String>,
}

impl Access {
    /// Reading from `repository`.
    pub fn pull(repository: impl Into<String>) -> Self {
        Self { repository: repository.into(), push: false, mount_from: None }
    }

    /// Reading from and writing to `repository`.
    pub fn push(repository: impl Into<String>) -> Self {
        Self { push: true, ..Self::pull(repository) }
    }

    /// Also reading from another repository of the registry, to mount its blobs.
    #[must_use]
    pub fn mounting_from(mut self, repository: impl Into<String>) -> Self {
        self.mount_from = Some(repository.into());
        self
    }

    fn scopes(&self) -> Vec<String> {
        let actions = if self.push { "pull,push" } else { "pull" };
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

#[derive(Debug)]
struct State {
    login: Login,
    /// Logins already looked up, by repository.
    logins: HashMap<String, Credentials>,
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
    /// The registry itself may be spoken to without TLS, so its token server may be, too.
    in_clear: bool,
    /// Short, never held across an await.
    state: Mutex<State>,
    /// Held by the one who asks the token server; taken before `state`.
    flight: tokio::sync::Mutex<()>,
}

impl Authenticator {
    /// For the registry that users name `host`.
    /// `in_clear` allows logins to token servers without TLS.
    pub fn new(http: Http, host: &str, login: Login, given: Option<Secret>, in_clear: bool) -> Self {
        let given = given.map(|token| Secret::new(format!("Bearer {}", token.expose())));
        let state = State {
            login,
            logins: HashMap::new(),
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
        match (self.obtain(access, &challenge, context).await, token) {
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
        let credentials = self.credentials(access, context).await?;
        // A user with a password can answer both kinds, anybody else only Bearer.
        let bearer = challenges.iter().find(|c| matches!(c, Challenge::Bearer { .. }));
        let basic = challenges.iter().find(|c| matches!(c, Challenge::Basic));
        let Some(challenge) = bearer.or(basic) else {
            let why = format!("registry {} asks for a login this client does not know", self.host);
            return Err(Error::new(ErrorKind::Unsupported, why).into());
        };
        if matches!(challenge, Challenge::Basic) && credentials.basic_header().as_ref() == used {
            return Ok(None);
        }
        self.state().challenge = Some(challenge.clone());
        self.obtain(access, challenge, context).await
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

    /// Makes or fetches the header that answers `challenge`; the caller holds the flight.
    async fn obtain(
        &self,
        access: &Access,
        challenge: &Challenge,
        context: &ReadContext,
    ) -> std::result::Result<Option<Secret>, Failure> {
        let generation = self.state().generation;
        let credentials = self.credentials(access, context).await?;
        let (header, life) = match (challenge, credentials) {
            (_, Credentials::RegistryToken(token)) => {
                (Secret::new(format!("Bearer {}", token.expose())), DEFAULT_LIFE)
            }
            (Challenge::Basic, credentials) => match credentials.basic_header() {
                Some(header) => return Ok(Some(header)),
                None => return Ok(None),
            },
            (Challenge::Bearer { realm, service, scope }, credentials) => {
                let mut scopes = access.scopes();
                // A registry that asks for something else than this client expects is believed.
                if let Some(asked) = scope {
                    let resource = |s: &str| s.rsplit_once(':').map(|(name, _)| name.to_owned());
                    let known: Vec<_> = scopes.iter().map(|s| resource(s)).collect();
                    let more = asked.split(' ').filter(|s| !s.is_empty() && !known.contains(&resource(s)));
                    scopes.extend(more.map(str::to_owned).collect::<Vec<_>>());
                }
                let ask = TokenRequest { realm, service: service.as_deref(), scopes: &scopes };
                self.fetch(&ask, &credentials, context).await?
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
        if open && !self.in_clear && *credentials != Credentials::Anonymous {
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

/// What is asked of a token server.
struct TokenRequest<'a> {
    realm: &'a Url,
    service: Option<&'a str>,
    scopes: &'a [String],
}

impl TokenRequest<'_> {
    fn query_url(&self) -> Url {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = self.service {
                query.append_pair("service", service);
            }
            for scope in self.scopes {
                query.append_pair("scope", scope);
            }
            query.append_pair("client_id", CLIENT_ID);
        }
        url
    }

    /// The OAuth2 form, for those who have something to present.
    fn form(&self, credentials: &Credentials) -> Option<String> {
        let mut form = Url::parse("form:").ok()?;
        {
            let mut pairs = form.query_pairs_mut();
            match credentials {
                Credentials::Basic { user, password } => {
                    pairs.append_pair("grant_type", "password");
                    pairs.append_pair("username", user).append_pair("password", password.expose());
                }
                Credentials::IdentityToken(token) => {
                    pairs.append_pair("grant_type", "refresh_token");
                    pairs.append_pair("refresh_token", token.expose());
                }
                Credentials::Anonymous | Credentials::RegistryToken(_) => return None,
            }
            if let Some(service) = self.service {
                pairs.append_pair("service", service);
            }
            pairs.append_pair("client_id", CLIENT_ID).append_pair("scope", &self.scopes.join(" "));
        }
        form.query().map(str::to_owned)
    }
}

fn parse_token(realm: &Url, answer: &[u8]) -> std::result::Result<(Secret, Duration), Failure> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    // The parser's message could repeat a token: it is left out.
    serde_json::from_slice::<TokenAnswer>(answer)
        .ok()
        .and_then(|a| {
            let token = a.token.or(a.access_token).filter(|token| !token.is_empty())?;
            let life = a.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs).clamp(MIN_LIFE, MAX_LIFE);
            Some((Secret::new(format!("Bearer {token}")), life))
        })
        .ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("token server {}: no token in its answer", shown(realm)))
                .into()
        })
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
mod tests {
    use super::*;
    use crate::backend::fault_server::{FaultServer, Reply};
    use crate::backend::http::HttpOptions;

    #[test]
    fn token_requests_carry_service_and_scopes() {
        let realm = Url::parse("https://auth.io/token?account=x").unwrap();
        let scopes = Access::push("a/b").mounting_from("c").scopes();
        assert_eq!(scopes, ["repository:a/b:pull,push", "repository:c:pull"]);
        let ask = TokenRequest { realm: &realm, service: Some("r.io"), scopes: &scopes };
        assert_eq!(
            ask.query_url().as_str(),
            "https://auth.io/token?account=x&service=r.io&scope=repository%3Aa%2Fb%3Apull%2Cpush\
             &scope=repository%3Ac%3Apull&client_id=nydus-registry-client"
        );
        let login = Credentials::Basic { user: "u&".into(), password: Secret::new("p=") };
        assert_eq!(
            ask.form(&login).unwrap(),
            "grant_type=password&username=u%26&password=p%3D&service=r.io&client_id=nydus-registry-client\
             &scope=repository%3Aa%2Fb%3Apull%2Cpush+repository%3Ac%3Apull"
        );
        assert_eq!(ask.form(&Credentials::Anonymous), None);
    }

    #[test]
    fn token_answers_are_read_in_both_spellings() {
        let realm = Url::parse("https://auth.io/token?s=1").unwrap();
        let (token, life) = parse_token(&realm, br#"{"token":"t"}"#).unwrap();
        assert_eq!((token.expose(), life), ("Bearer t", DEFAULT_LIFE));
        let (token, life) = parse_token(&realm, br#"{"access_token":"a","expires_in":60}"#).unwrap();
        assert_eq!((token.expose(), life.as_secs()), ("Bearer a", 60));
        for bad in ["{}", "", r#"{"token":""}"#, r#"{"token":7,"secret":"hunter2"}"#] {
            let err = parse_token(&realm, bad.as_bytes()).unwrap_err().error;
            assert!(err.kind() == ErrorKind::Invalid && !err.to_string().contains("hunter2"), "{err}");
        }
    }

    #[tokio::test]
    async fn tokens_are_renewed_before_they_expire_and_outlive_a_failed_renewal() {
        let server = FaultServer::start(|asked| match asked.number {
            0 | 1 => Reply::new(200, format!(r#"{{"token":"t{}","expires_in":0}}"#, asked.number)),
            _ => Reply::new(503, ""),
        })
        .await;
        let http = Http::new(&HttpOptions::default()).unwrap();
        let auth = Authenticator::new(http, "r.io", Login::Fixed(Credentials::Anonymous), None, true);
        let (access, context) = (Access::pull("a/b"), ReadContext::on_demand(None));
        let challenge = Challenge::parse(&format!(r#"Bearer realm="http://{}/token""#, server.host()));
        let first = auth.renew(&access, challenge, None, &context).await.unwrap().unwrap();
        let header = async || auth.header(&access, &context).await.map(|header| header.unwrap());
        assert_eq!((header().await.unwrap(), first.expose()), (first.clone(), "Bearer t0"));
        let edit = |change: fn(&mut Token)| change(auth.state().tokens.get_mut(&access).unwrap());
        edit(|token| token.renew = Instant::now());
        assert_eq!(header().await.unwrap().expose(), "Bearer t1");
        edit(|token| token.renew = Instant::now());
        assert_eq!(header().await.unwrap().expose(), "Bearer t1");
        edit(|token| token.expires = Instant::now());
        assert!(header().await.unwrap_err().passing);
        assert_eq!(server.asked().len(), 4);
    }

    #[tokio::test]
    async fn logins_do_not_go_out_in_clear() {
        let http = Http::new(&HttpOptions::default()).unwrap();
        let login = Credentials::Basic { user: "u".into(), password: Secret::new("p") };
        let auth = Authenticator::new(http, "r.io", Login::Fixed(login), None, false);
        let challenge = Challenge::parse(r#"Bearer realm="http://auth.invalid/token?x=y""#);
        let context = ReadContext::on_demand(None);
        let failure = auth.renew(&Access::pull("a/b"), challenge, None, &context).await.unwrap_err();
        assert!(failure.error.kind() == ErrorKind::Denied && !failure.passing, "{failure:?}");
        assert!(failure.error.to_string().contains("in clear to http://auth.invalid/token"), "{failure:?}");
    }
}
