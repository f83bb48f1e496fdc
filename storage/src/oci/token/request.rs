//! What is asked of a token server, and what it answers.

use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;

use super::DEFAULT_LIFE;
use crate::backend::http::shown;
use crate::backend::retry::Failure;
use crate::oci::auth::{Credentials, Secret};
use crate::{Error, ErrorKind};

/// How this client names itself to token servers (the contract's client id).
const CLIENT_ID: &str = "nydus-registry-client";
/// Shorter lives are taken for this one, as docker does: servers say 0 and mean nothing by it.
/// A token that is over sooner is answered with 401 and renewed.
const MIN_LIFE: Duration = Duration::from_secs(60);
/// Longer lives are cut to this.
const MAX_LIFE: Duration = Duration::from_secs(86_400);

/// What is asked of a token server.
pub(super) struct TokenRequest<'a> {
    pub(super) realm: &'a Url,
    pub(super) service: Option<&'a str>,
    pub(super) scopes: &'a [String],
}

impl TokenRequest<'_> {
    /// The question as a URL, for servers without a form.
    pub(super) fn query_url(&self) -> Url {
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
    pub(super) fn form(&self, credentials: &Credentials) -> Option<String> {
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

/// The token in `answer` of `realm`, as a header, and how long it lives.
///
/// # Errors
/// `Invalid`: there is none.
pub(super) fn parse_token(realm: &Url, answer: &[u8]) -> std::result::Result<(Secret, Duration), Failure> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: Option<String>,
        access_token: Option<String>,
        /// Seconds: a number, not always a whole one, or a text of it.
        #[serde(default)]
        expires_in: serde_json::Value,
    }
    // The parser's message could repeat a token: it is left out.
    serde_json::from_slice::<TokenAnswer>(answer)
        .ok()
        .and_then(|a| {
            let token = [a.token, a.access_token].into_iter().flatten().find(|token| !token.is_empty())?;
            let seconds = match &a.expires_in {
                serde_json::Value::String(text) => text.parse().ok(),
                value => value.as_f64(),
            };
            let bounds = (MIN_LIFE.as_secs_f64(), MAX_LIFE.as_secs_f64());
            let life = seconds
                .filter(|seconds: &f64| !seconds.is_nan())
                .map_or(DEFAULT_LIFE, |seconds| Duration::from_secs_f64(seconds.clamp(bounds.0, bounds.1)));
            Some((Secret::new(format!("Bearer {token}")), life))
        })
        .ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("token server {}: no token in its answer", shown(realm)))
                .into()
        })
}
