use reqwest::Url;

use super::*;
use crate::backend::fault_server::{FaultServer, Reply};
use crate::backend::http::HttpOptions;

/// A registry that is spoken to in clear, or not.
fn clear(clear: bool) -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(clear))
}

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
    for (life, seconds) in
        [("90.5", 90), ("\"120\"", 120), ("null", 600), ("-1", 60), ("1e300", 86_400), ("[]", 600)]
    {
        let answer = format!(r#"{{"token":"","access_token":"a","expires_in":{life}}}"#);
        let (token, life) = parse_token(&realm, answer.as_bytes()).unwrap();
        assert_eq!((token.expose(), life.as_secs()), ("Bearer a", seconds), "{answer}");
    }
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
    let auth = Authenticator::new(http, "r.io", Login::Fixed(Credentials::Anonymous), None, clear(true));
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
    let auth = Authenticator::new(http, "r.io", Login::Fixed(login), None, clear(false));
    let challenge = Challenge::parse(r#"Bearer realm="http://auth.invalid/token?x=y""#);
    let context = ReadContext::on_demand(None);
    let failure = auth.renew(&Access::pull("a/b"), challenge, None, &context).await.unwrap_err();
    assert!(failure.error.kind() == ErrorKind::Denied && !failure.passing, "{failure:?}");
    assert!(failure.error.to_string().contains("in clear to http://auth.invalid/token"), "{failure:?}");
}

/// A login file with this password.
fn write_login(path: &std::path::Path, password: &str) {
    use base64::Engine as _;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("u:{password}"));
    std::fs::write(path, format!(r#"{{"auths":{{"r.io":{{"auth":"{auth}"}}}}}}"#)).unwrap();
}

/// A token server that accepts this password alone.
async fn token_server(password: &'static str) -> FaultServer {
    FaultServer::start(move |asked| {
        let form = String::from_utf8_lossy(&asked.body).into_owned();
        match (asked.method.as_str(), form.contains(&format!("&password={password}&"))) {
            ("POST", true) => Reply::new(200, r#"{"token":"good"}"#),
            _ => Reply::new(401, ""),
        }
    })
    .await
}

/// Tokens of clouds last for hours, and people log in again: a login was read once and used for ever.
#[tokio::test]
async fn a_login_that_is_refused_is_looked_up_again() {
    let server = token_server("new").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    write_login(&file, "old");
    let http = Http::new(&HttpOptions::default()).unwrap();
    let files = Login::Files(AuthFiles::new(vec![file.clone()]));
    let auth = Authenticator::new(http, "r.io", files, None, clear(true));
    let context = ReadContext::on_demand(None);
    let challenge = || Challenge::parse(&format!(r#"Bearer realm="http://{}/token""#, server.host()));
    let old = Access::pull("a/b");
    assert_eq!(
        auth.renew(&old, challenge(), None, &context).await.unwrap_err().error.kind(),
        ErrorKind::Denied
    );
    // Refused by form and by query; the file had nothing else. It is not tried again at once.
    assert_eq!(
        auth.renew(&old, challenge(), None, &context).await.unwrap_err().error.kind(),
        ErrorKind::Denied
    );
    assert!(auth.header(&old, &context).await.is_err());
    assert_eq!(server.asked().len(), 2);

    write_login(&file, "new");
    let header = auth.renew(&Access::push("a/b"), challenge(), None, &context).await.unwrap().unwrap();
    assert_eq!(header.expose(), "Bearer good");
    assert_eq!(server.asked().len(), 2 + 3);
    // For the first scope too, now that there is another login.
    auth.renew(&old, challenge(), None, &context).await.unwrap().unwrap();
}

/// Some registries say 403 to a login that has expired.
#[tokio::test]
async fn a_forbidden_login_is_replaced_by_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    write_login(&file, "old");
    let http = Http::new(&HttpOptions::default()).unwrap();
    let files = Login::Files(AuthFiles::new(vec![file.clone()]));
    let auth = Authenticator::new(http, "r.io", files, None, clear(true));
    let (access, context) = (Access::pull("a/b"), ReadContext::on_demand(None));
    let basic = || vec![Challenge::Basic];
    let old = auth.renew(&access, basic(), None, &context).await.unwrap().unwrap();
    write_login(&file, "new");
    let new = auth.reconsider(&access, &old, &context).await.unwrap().unwrap();
    assert_ne!(old, new);
    // Who was refused with the old one meanwhile gets the new one; that one has no better.
    assert_eq!(auth.reconsider(&access, &old, &context).await.unwrap(), Some(new.clone()));
    assert_eq!(auth.reconsider(&access, &new, &context).await.unwrap(), None);
    assert_eq!(auth.header(&access, &context).await.unwrap(), Some(new.clone()));
    assert_eq!(auth.renew(&access, basic(), Some(&new), &context).await.unwrap(), None);
}
