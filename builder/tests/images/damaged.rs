//! Commands that rewrite images, before images that somebody has tampered with: an error, or an
//! image that is right; never a panic, never a file that is neither.

use crate::layers::{File, Workshop, done, nydus_image, piece};
use crate::random::Dice;

/// Bytes at the start of a bootstrap where its tables are.
const TABLES: u32 = 0x3000;

fn files(first: u32, count: u32) -> Vec<File> {
    (first..first + count).map(|n| (format!("d/{n}"), piece(n)[..1 + n as usize * 97].to_vec())).collect()
}

/// Runs a command, which may succeed or refuse; true if it succeeded.
fn ends(arguments: &[&str]) -> bool {
    let output = nydus_image(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => true,
        Some(1 | 2) => {
            assert!(said.contains("Error: ") && !said.contains("panicked"), "{arguments:?}: {said}");
            false
        }
        other => panic!("{arguments:?}: {other:?}, {said}"),
    }
}

#[test]
fn whatever_is_forged_is_refused_or_rewritten_right() {
    for (version, kind) in [("6", &["--batch-size", "0x1000"][..]), ("6", &[]), ("5", &[])] {
        let shop = Workshop::open();
        let flags = [&["--chunk-size", "0x1000", "--fs-version", version], kind].concat();
        shop.image("good", &[files(0, 25), files(20, 20)], &flags);
        std::fs::create_dir(shop.path("app:v1")).unwrap();
        std::fs::copy(shop.path("good"), shop.path("app:v1/boot")).unwrap();
        std::fs::write(shop.path("list"), r#"{"version": "v1", "files": [{"path": "/d"}]}"#).unwrap();
        let good = std::fs::read(shop.path("good")).unwrap();
        let (boot, list, blobs, new) = (shop.at("boot"), shop.at("list"), shop.at("blobs"), shop.at("new"));
        let sound = shop.at("app:v1/boot");
        let mut rewritten = 0;
        for seed in 0..40 {
            let mut dice = Dice::new(seed);
            let mut bytes = good.clone();
            for _ in 0..=dice.roll(3) {
                let end = if dice.roll(2) == 0 { TABLES } else { u32::MAX }.min(bytes.len() as u32);
                let at = dice.roll(end) as usize;
                bytes[at] =
                    [0, 0xff, bytes[at] ^ 1 << dice.roll(8), dice.roll(256) as u8][dice.roll(4) as usize];
            }
            std::fs::write(&boot, &bytes).unwrap();
            let quiet = ["--log-level", "error", "-B", &boot, "-O", &new];
            let compact = ["compact", "--min-used-ratio", "90", "-D", &blobs];
            let optimize = ["optimize", "-p", &list, "-D", &blobs];
            for command in [compact, optimize] {
                let _ = std::fs::remove_file(&new);
                if ends(&[&command[..], &quiet].concat()) && shop.path("new").exists() {
                    rewritten += 1;
                    done(&["check", "--log-level", "error", &new]);
                    // What is said of chunks that stay is carried over, and found when they are read.
                    let unpack = |boot: &str| nydus_image(&["unpack", "-B", boot, "-D", &blobs, "-o", "-"]);
                    let (before, after) = (unpack(&boot), unpack(&new));
                    if before.status.success() {
                        assert!(after.status.success() && after.stdout == before.stdout, "seed {seed}");
                    }
                } else {
                    assert!(!shop.path("new").exists());
                }
            }
            let generate = ["chunkdict", "generate", "--log-level", "error", "-B", &new, &boot, &sound];
            if ends(&generate) {
                done(&["check", "--log-level", "error", &new]);
            }
        }
        assert!(rewritten > 5, "{rewritten}: too much is damaged to tell");
    }
}
