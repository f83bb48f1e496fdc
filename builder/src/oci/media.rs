//! Media types and annotation keys (rafs-v6 section 10; OCI image and docker distribution specifications).

/// Nydus data blob.
pub const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
pub use storage::oci::layout::REF_NAME as ANNOTATION_REF_NAME;
pub use storage::oci::manifest::{OCI_INDEX, OCI_MANIFEST};

/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// On a blob layer: `true`.
pub const ANNOTATION_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// On the bootstrap layer: `true`.
pub const ANNOTATION_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// On the bootstrap layer: `6`.
pub const ANNOTATION_FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
/// On the manifest and the bootstrap layer: the image root digest.
pub const ANNOTATION_ROOT_DIGEST: &str = "containerd.io/snapshot/nydus-root-digest";

/// What the history says of the bootstrap layer.
pub const BOOTSTRAP_COMMENT: &str = "Nydus Bootstrap Layer";

/// True for a tar layer that can be converted: plain, gzip or zstd.
pub fn is_layer(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.layer.v1.tar"
            | OCI_LAYER_GZIP
            | OCI_LAYER_ZSTD
            | "application/vnd.docker.image.rootfs.diff.tar"
            | DOCKER_LAYER_GZIP
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
    )
}
