//! `nydusctl info`.

use nydusd::words::printable;
use serde_json::Value;

/// The daemon for people.
pub fn text(info: &Value) -> String {
    let version = &info["version"];
    // Directories have neither bootstrap nor cache, images no directory.
    let line = |label: &str, value: &Value| (!value.is_null()).then(|| line(label, value));
    let mut lines = vec![
        line("Version", &version["package_ver"]),
        line("Status", &info["state"]),
        line("Profile", &version["profile"]),
        line("Commit", &version["git_commit"]),
    ];
    for (mountpoint, mount) in info["backend_collection"].as_object().into_iter().flatten() {
        let config = &mount["config"];
        lines.extend([
            Some(format!("\nInstance {}:", printable(mountpoint))),
            line("  Type", &mount["backend_type"]),
            line("  Mounted Time", &mount["mounted_time"]),
            line("  Bootstrap", &mount["bootstrap"]),
            line("  Verified", &mount["verified"]),
            line("  Source", &mount["source"]),
        ]);
        if let Some(kind) = config["backend"]["type"].as_str() {
            lines.push(Some(format!("  {:<16}{kind}", "Backend:")));
            for (key, value) in config["backend"][kind].as_object().into_iter().flatten() {
                if value != &Value::Array(Vec::new()) {
                    lines.push(line(&format!("    {key}"), value));
                }
            }
        }
        lines.push(line("  Cache", &config["cache"]["filecache"]["work_dir"]));
    }
    lines.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

fn line(label: &str, value: &Value) -> String {
    let label = format!("{label}:");
    match value {
        Value::String(text) => format!("{label:<18}{}", printable(text)),
        other => format!("{label:<18}{other}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_mount_does_not_have_is_left_out() {
        let mount = json!({
            "backend_type": "PassthroughFs", "mountpoint": "/d", "mounted_time": "now", "config": null,
            "bootstrap": null, "source": "/srv/d",
        });
        let info = json!({ "version": {}, "state": "RUNNING", "backend_collection": { "/d": mount } });
        let text = text(&info);
        assert!(!text.contains("null") && text.contains("  Source:         /srv/d"), "{text}");
    }
}
