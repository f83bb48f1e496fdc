//! Object stores, as configured.

use crate::oci::auth::Secret;
use serde_json::{Map, Value, json};

use super::ConfigError;
use super::backend::{read_scheme, text};
use super::section::Section;
use super::transport::TransportConfig;

/// A bucket of an object store (`s3`, `oss`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// What it speaks.
    pub dialect: Dialect,
    /// `https` or `http`.
    pub scheme: String,
    /// Host, with port if not the scheme's. Empty for S3: that of AWS in the region.
    pub endpoint: String,
    /// Bucket.
    pub bucket_name: String,
    /// What stands before a blob's id in its key.
    pub object_prefix: String,
    /// `access_key_id` and `access_key_secret`. Secret.
    pub keys: Option<(Secret, Secret)>,
    /// Look for credentials where the store's own tools do.
    pub credentials_from_environment: bool,
    /// How to reach it.
    pub transport: TransportConfig,
}

/// The kinds of object stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// S3, signature version 4, with the region to sign for.
    S3(String),
    /// Alibaba Cloud OSS.
    Oss,
}

impl Dialect {
    /// The word for it in configuration.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::S3(_) => "s3",
            Self::Oss => "oss",
        }
    }
}

impl StoreConfig {
    pub(super) fn read_s3(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let name = section.name("endpoint");
        let endpoint = section
            .take_string("endpoint")?
            .ok_or_else(|| ConfigError::new(format!("`{name}` is required; leave it empty for AWS")))?;
        let region = section.require_string("region")?;
        Self::read(Dialect::S3(region), endpoint, section, warnings)
    }

    pub(super) fn read_oss(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let endpoint = section.require_string("endpoint")?;
        Self::read(Dialect::Oss, endpoint, section, warnings)
    }

    fn read(
        dialect: Dialect,
        endpoint: String,
        section: &mut Section,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let (id_name, secret_name) = (section.name("access_key_id"), section.name("access_key_secret"));
        let id = text(section.take_string("access_key_id")?);
        let secret = text(section.take_string("access_key_secret")?);
        let keys = match (id, secret) {
            (Some(id), Some(secret)) => Some((Secret::new(id), Secret::new(secret))),
            (None, None) => None,
            _ => {
                let why = format!("`{id_name}` and `{secret_name}`: want both, or neither");
                return Err(ConfigError::new(why));
            }
        };
        let name = section.name("credentials_from_environment");
        let from_environment = section.take_bool("credentials_from_environment")?.unwrap_or(false);
        if from_environment && keys.is_some() {
            return Err(ConfigError::new(format!("`{name}`: not together with `{id_name}`")));
        }
        Ok(Self {
            dialect,
            scheme: read_scheme(section)?,
            endpoint,
            bucket_name: section.require_string("bucket_name")?,
            object_prefix: section.take_string("object_prefix")?.unwrap_or_default(),
            keys,
            credentials_from_environment: from_environment,
            transport: TransportConfig::read(section, warnings)?,
        })
    }

    /// Its fields without secrets.
    pub(super) fn public_json(&self) -> Value {
        let mut fields = Map::from_iter([
            ("scheme".to_owned(), json!(self.scheme)),
            ("endpoint".to_owned(), json!(self.endpoint)),
            ("bucket_name".to_owned(), json!(self.bucket_name)),
            ("object_prefix".to_owned(), json!(self.object_prefix)),
            ("credentials_from_environment".to_owned(), json!(self.credentials_from_environment)),
        ]);
        if let Dialect::S3(region) = &self.dialect {
            fields.insert("region".to_owned(), json!(region));
        }
        self.transport.public_json(fields)
    }
}
