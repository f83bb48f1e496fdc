//! TLS: whom to trust, and what to show who asks.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::HttpOptions;
use crate::{Error, ErrorKind, Result};

/// TLS with ring, the system's roots and the private ones.
pub(super) fn config(options: &HttpOptions) -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::new(ErrorKind::Unsupported, "set up TLS").with_source(e))?;
    let trust = match options.skip_verify {
        true => None,
        false => Some(Trust { private: private_roots(&options.ca_files)?, verifier: OnceLock::new() }),
    };
    let verifier = Arc::new(Verifier { provider, trust });
    if verifier.trust.is_some() {
        // The answer to the first handshake is two round trips away: it is done by then. Should there be no
        // thread for it, whoever verifies first does it.
        let early = Arc::clone(&verifier);
        let read = move || early.trust.as_ref().map(|trust| trust.verifier(&early.provider).map(drop));
        let _ = std::thread::Builder::new().name("tls-roots".to_owned()).spawn(read);
    }
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match &options.client_certificate {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let what = || format!("client certificate {} with key {}", chain.display(), key.display());
            let invalid = |e: String| Error::new(ErrorKind::Invalid, format!("{}: {e}", what()));
            let read = |path: &PathBuf| crate::outside::read(path).map_err(|e| Error::io(what(), e));
            let chain =
                CertificateDer::pem_slice_iter(&read(chain)?).collect::<std::result::Result<Vec<_>, _>>();
            let key = PrivateKeyDer::from_pem_slice(&read(key)?);
            let (chain, key) =
                (chain.map_err(|e| invalid(e.to_string()))?, key.map_err(|e| invalid(e.to_string()))?);
            builder.with_client_auth_cert(chain, key).map_err(|e| invalid(e.to_string()))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// How long the system's roots hold once they were read. They are a file or two for each authority, which is
/// milliseconds for every image that is mounted; and who changes them does not wait long.
const ROOTS_HOLD: Duration = Duration::from_secs(60);

/// The system's roots, and when they were read. Held while they are read, so that one does it for all.
static SYSTEM_ROOTS: Mutex<Option<(Instant, RootCertStore)>> = Mutex::new(None);

fn system_roots() -> RootCertStore {
    let mut kept = SYSTEM_ROOTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((read, roots)) = &*kept
        && read.elapsed() < ROOTS_HOLD
    {
        return roots.clone();
    }
    let mut roots = RootCertStore::empty();
    // A machine without system roots still reaches plain http and private CAs; what is
    // missing shows as an untrusted certificate.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    *kept = Some((Instant::now(), roots.clone()));
    roots
}

fn private_roots(ca_files: &[PathBuf]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for path in ca_files {
        let what = || format!("CA file {}", path.display());
        let pem = crate::outside::read(path).map_err(|e| Error::io(what(), e))?;
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let added =
                certificate.map_err(|e| e.to_string()).and_then(|c| roots.add(c).map_err(|e| e.to_string()));
            added.map_err(|e| Error::new(ErrorKind::Invalid, format!("{}: {e}", what())))?;
            count += 1;
        }
        if count == 0 {
            return Err(Error::new(ErrorKind::Invalid, format!("{}: no PEM certificate in it", what())));
        }
    }
    Ok(roots)
}

/// Whom to trust: the private authorities and the system's, which are asked for when a server shows its own.
#[derive(Debug)]
struct Trust {
    private: RootCertStore,
    verifier: OnceLock<Arc<WebPkiServerVerifier>>,
}

impl Trust {
    /// Reads the system's roots, once.
    fn verifier(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> std::result::Result<&WebPkiServerVerifier, rustls::Error> {
        if let Some(verifier) = self.verifier.get() {
            return Ok(verifier);
        }
        let mut roots = system_roots();
        roots.roots.extend(self.private.roots.iter().cloned());
        let made = WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(provider))
            .build()
            // There are no roots at all.
            .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        Ok(self.verifier.get_or_init(|| made))
    }
}

/// Checks the signature of a handshake always, and the server's certificate where somebody is trusted: without
/// (`skip_verify`) any will do.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Option<Trust>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        match &self.trust {
            Some(trust) => trust.verifier(&self.provider)?.verify_server_cert(
                certificate,
                intermediates,
                name,
                ocsp,
                now,
            ),
            None => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
