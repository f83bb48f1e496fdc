//! What goes back to a client, and the words that clients search errors for (contract 3.2).

use hyper::StatusCode;
use serde::Serialize;
use serde_json::json;

/// What goes back to the client.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: Option<Vec<u8>>,
}

/// What most answers are.
const JSON: &str = "application/json";

impl Reply {
    /// A document.
    pub fn json(document: &impl Serialize) -> Self {
        match serde_json::to_vec(document) {
            Ok(body) => Self { status: StatusCode::OK, content_type: JSON, body: Some(body) },
            Err(e) => Self::error(500, &format!("Serialize(\"{e}\")")),
        }
    }

    /// A document that is text already.
    pub fn text(content_type: &'static str, text: impl Into<Vec<u8>>) -> Self {
        Self { status: StatusCode::OK, content_type, body: Some(text.into()) }
    }

    /// JSON that is text already.
    pub fn json_text(text: &'static str) -> Self {
        Self::text(JSON, text)
    }

    /// Done, with nothing to say.
    pub fn empty() -> Self {
        Self { status: StatusCode::NO_CONTENT, content_type: JSON, body: None }
    }

    /// The error document.
    pub fn error(status: u16, message: &str) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, content_type: JSON, body: Some(error_document(message)) }
    }

    /// Method, body or request line are not what the path takes.
    pub fn bad_request() -> Self {
        Self::error(400, "BadRequest")
    }

    /// A query parameter is missing or wrong.
    pub fn bad_query(why: &str) -> Self {
        Self::error(400, &format!("QueryString({why:?})"))
    }

    /// The body is not the JSON that the path takes. What it says instead is not repeated: it
    /// may be secret, and clients log our errors.
    pub fn bad_body(error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let text = match text.rsplit_once(", expected ") {
            Some((found, wanted)) if found.starts_with("invalid ") => format!("expected {wanted}"),
            _ => text,
        };
        Self::error(400, &format!("ParseBody(Error({text:?}))"))
    }

    /// A service that this kind of daemon does not have.
    pub fn unsupported(wrapper: &str) -> Self {
        Self::error(501, &format!("{wrapper}(DaemonAbnormal(Unsupported))"))
    }

    /// No such mount, or none or several where one was not named.
    pub fn no_counter(wrapper: &str) -> Self {
        Self::error(404, &format!("{wrapper}(Metrics(Stats(NoCounter)))"))
    }

    /// The event does not fit the daemon's state.
    pub fn unexpected(wrapper: &str, event: &str) -> Self {
        Self::error(400, &format!("{wrapper}(DaemonAbnormal(UnexpectedEvent(\"{event}\")))"))
    }
}

/// The body of every error: clients decode both members.
pub(super) fn error_document(message: &str) -> Vec<u8> {
    json!({ "code": "UNDEFINED", "message": message }).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_contracts_shape() {
        let reply = Reply::error(404, "NoRoute");
        assert_eq!(reply.status, 404);
        assert_eq!(reply.body.unwrap(), br#"{"code":"UNDEFINED","message":"NoRoute"}"#);
        let error = serde_json::from_str::<Vec<u32>>("\"secret, expected\"").unwrap_err();
        let body = String::from_utf8(Reply::bad_body(&error).body.unwrap()).unwrap();
        assert!(
            body.contains("ParseBody(Error(\\\"expected a sequence") && !body.contains("secret"),
            "{body}"
        );
        let quoted = Reply::bad_query("no \"id\"").body.unwrap();
        let parsed: serde_json::Value = serde_json::from_slice(&quoted).unwrap();
        assert_eq!(parsed["message"], r#"QueryString("no \"id\"")"#);
    }
}
