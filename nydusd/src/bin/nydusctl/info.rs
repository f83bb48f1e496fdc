//! `nydusctl info`.

use serde_json::Value;

/// The daemon for people.
pub fn text(info: &Value) -> String {
    let version = &info["version"];
    let mut lines = vec![
        line("Version", &version["package_ver"]),
        line("Status", &info["state"]),
        line("Profile", &version["profile"]),
        line("Commit", &version["git_commit"]),
    ];
    for (mountpoint, mount) in info["backend_collection"].as_object().into_iter().flatten() {
        let config = &mount["config"];
        lines.extend([
            format!("\nInstance {mountpoint}:"),
            line("  Type", &mount["backend_type"]),
            line("  Mounted Time", &mount["mounted_time"]),
            line("  Bootstrap", &mount["bootstrap"]),
            line("  Verified", &mount["verified"]),
        ]);
        if let Some(kind) = config["backend"]["type"].as_str() {
            lines.push(format!("  {:<16}{kind}", "Backend:"));
            for (key, value) in config["backend"][kind].as_object().into_iter().flatten() {
                if !value.is_null() && value != &Value::Array(Vec::new()) {
                    lines.push(line(&format!("    {key}"), value));
                }
            }
        }
        lines.push(line("  Cache", &config["cache"]["filecache"]["work_dir"]));
    }
    lines.join("\n")
}

fn line(label: &str, value: &Value) -> String {
    let label = format!("{label}:");
    match value {
        Value::String(text) => format!("{label:<18}{text}"),
        other => format!("{label:<18}{other}"),
    }
}
