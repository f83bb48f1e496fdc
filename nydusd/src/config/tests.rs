use std::collections::BTreeSet;

use clap::Parser as _;
use storage::prefetch::Prefer;

use super::*;

fn v1(extra: &str) -> String {
    format!(
        r#"{{"device":{{"backend":{{"type":"localfs","config":{{"dir":"/b"}}}},
            "cache":{{"type":"blobcache","config":{{"work_dir":"/c"}}}}}},"mode":"direct"{extra}}}"#
    )
}

fn registry(fields: &str) -> String {
    format!(
        r#"{{"device":{{"backend":{{"type":"registry","config":{{"host":"h:5000","repo":"r/x"{fields}}}}},
            "cache":{{"type":"blobcache"}}}},"mode":"direct"}}"#
    )
}

#[test]
fn every_sample_configuration_loads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../misc/configs");
    let mut loaded = BTreeSet::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(config.warnings.is_empty(), "{}: {:?}", path.display(), config.warnings);
        let text = std::fs::read_to_string(&path).unwrap();
        loaded.insert((if text.contains("\"device\"") { 1 } else { 2 }, config.backend.kind()));
        // What a sample says of its use can be typed.
        for line in text.lines().filter_map(|line| line.strip_prefix("# nydusd ")) {
            let arguments = std::iter::once("nydusd").chain(line.split_whitespace());
            crate::cli::Cli::try_parse_from(arguments).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
    // http-proxy came with v2.
    let both = ["localdisk", "localfs", "oss", "registry", "s3"];
    let wanted: BTreeSet<_> =
        both.into_iter().flat_map(|kind| [(1, kind), (2, kind)]).chain([(2, "http-proxy")]).collect();
    assert_eq!(loaded, wanted);
}

#[test]
fn an_overlay_names_two_directories() {
    let v2 = |overlay: &str| {
        format!(
            r#"{{"version":2,"backend":{{"type":"localfs","localfs":{{"dir":"/b"}}}},"cache":{{"type":"filecache"}},
                "overlay":{overlay}}}"#
        )
    };
    let config = Config::parse(&v2(r#"{"upper_dir":"/u","work_dir":"/w","upperdir":1}"#)).unwrap();
    let overlay = config.overlay.clone().unwrap();
    assert_eq!((overlay.upper_dir.as_path(), overlay.work_dir.as_path()), (Path::new("/u"), Path::new("/w")));
    assert_eq!(config.public_json()["overlay"]["work_dir"], "/w");
    assert_eq!(config.warnings, ["unknown key `overlay.upperdir` is ignored; did you mean `upper_dir`?"]);
    assert!(Config::parse(&v2("null")).unwrap().overlay.is_none());
    for (bad, text) in [
        (r#"{"upper_dir":"/u"}"#, "`overlay.work_dir` is required"),
        (r#"{"upper_dir":"","work_dir":"/w"}"#, "`overlay.upper_dir`"),
        (r#"{"upper_dir":"u","work_dir":"/w"}"#, "`overlay.upper_dir`: \"u\": want an absolute path"),
    ] {
        let error = Config::parse(&v2(bad)).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn v1_is_read_with_its_defaults() {
    let config = Config::parse(&v1("")).unwrap();
    assert!(config.enable_xattr, "absent means true");
    assert_eq!(config.work_dir, Path::new("/c"));
    assert_eq!(config.outage_policy(), OutagePolicy::DEFAULT);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    assert!(!Config::parse(&v1(r#","enable_xattr":false"#)).unwrap().enable_xattr);
    let config = Config::parse(&v1(r#","on_outage":"wait""#)).unwrap();
    assert_eq!(config.outage_policy(), OutagePolicy::Wait);
    assert_eq!(config.trace, trace::Mode::On);
    let config = Config::parse(&v1(r#","trace":"record","trace_seconds":1.5"#)).unwrap();
    assert_eq!(
        (config.trace, config.trace_limits.longest),
        (trace::Mode::Record, Duration::from_millis(1500))
    );
    for bad in [r#","trace":"maybe""#, r#","trace":true"#, r#","trace_seconds":0"#] {
        assert!(Config::parse(&v1(bad)).unwrap_err().to_string().contains("`trace"), "{bad}");
    }
    let config = Config::parse(&v1(r#","read_timeout":0.5"#)).unwrap();
    assert_eq!(config.outage_policy(), OutagePolicy::FailAfter(Duration::from_millis(500)));
}

#[test]
fn v2_is_read_from_json_and_toml() {
    let toml = "version = 2\nid = 'x'\n[backend]\ntype = 'localfs'\nlocalfs = { dir = '/b' }\n\
                [cache]\ntype = 'filecache'\nfilecache = { work_dir = '/c' }\n\
                [rafs]\nmode = 'cached'\nenable_xattr = false\n";
    let json = r#"{"version":2,"id":"x","backend":{"type":"localfs","localfs":{"dir":"/b"}},
        "cache":{"type":"filecache","filecache":{"work_dir":"/c"}},"rafs":{"mode":"cached","enable_xattr":false}}"#;
    for text in [toml, json] {
        let config = Config::parse(text).unwrap();
        assert_eq!((config.id.as_str(), config.enable_xattr), ("x", false), "{text}");
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    }
    // Recognised as v2 and refused: v1 is not tried.
    let refused = v1(r#","version":3"#);
    assert!(Config::parse(&refused).unwrap_err().to_string().contains("`version`"));
}

/// The documented v2 key was ignored as unknown once.
#[test]
fn owners_are_remapped_in_both_formats() {
    let v2 = r#"{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/b"}},
        "cache":{"type":"filecache"},"rafs":{"id_mapping":[0,100000,65536]}}"#;
    for text in [v2.to_owned(), v1(r#","id_mapping":[0,100000,65536]"#)] {
        let config = Config::parse(&text).unwrap();
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        let mapping = config.id_mapping.unwrap();
        assert_eq!((mapping.shown(7), mapping.shown(65536)), (100_007, 65536));
    }
}

#[test]
fn proxies_of_the_environment_are_used_only_if_asked_for() {
    let proxied = |text: &str| match Config::parse(text).unwrap().backend {
        BackendConfig::Registry(registry) => registry.transport.proxy_from_environment,
        other => panic!("{other:?}"),
    };
    assert!(!proxied(&registry("")));
    assert!(proxied(&registry(r#","proxy_from_environment":true"#)));
}

#[test]
fn unknown_keys_warn_with_the_nearest_known_one() {
    let config = Config::parse(&v1(r#","enable_xatr":true,"zzz":1"#)).unwrap();
    assert_eq!(
        config.warnings,
        [
            "unknown key `enable_xatr` is ignored; did you mean `enable_xattr`?",
            "unknown key `zzz` is ignored"
        ]
    );
}

#[test]
fn what_clients_send_is_accepted() {
    let sent = r#","readahead":true,"readahead_sec":300,"warmup":0,"id":"x","iostats_files":true,
        "fs_prefetch":{"enable":true,"threads_count":4,"prefetch_all":true},"id_mapping":[0,100000,65536]"#;
    let config = Config::parse(&v1(sent)).unwrap();
    let mapping = config.id_mapping.unwrap();
    assert_eq!((mapping.shown(0), mapping.shown(65535), mapping.shown(65536)), (100_000, 165_535, 65_536));
    assert!(config.files.counters && !config.files.pattern && !config.files.latest);
    let prefetch = PrefetchConfig { enable: true, all: true, threads: 4, ..PrefetchConfig::default() };
    assert_eq!(config.prefetch, prefetch);
    let proxy = r#","proxy":{"url":"","fallback":true,"check_interval":5},"mirrors":[]"#;
    assert!(Config::parse(&registry(proxy)).unwrap().warnings.is_empty());
    assert!(Config::parse(&v1(r#","id_mapping":[5,5,10]"#)).unwrap().id_mapping.is_none());
}

#[test]
fn prefetch_blocks_are_read_in_both_formats() {
    let limit = |bytes| std::num::NonZeroU64::new(bytes);
    let config = Config::parse(&v1("")).unwrap();
    assert_eq!(config.prefetch, PrefetchConfig::default());
    assert_eq!(config.read_ahead, ReadAhead { amplify: 1 << 20, prefer: Prefer::Time });

    let config = Config::parse(&v1(r#","amplify_io":0,"prefer":"bytes",
           "fs_prefetch":{"enable":true,"bandwidth_rate":4096,"merging_size":131072}"#))
    .unwrap();
    assert_eq!(config.read_ahead, ReadAhead { amplify: 0, prefer: Prefer::Bytes });
    // v1 fetches everything unless told otherwise, v2 only if told to.
    let mut wanted = PrefetchConfig {
        enable: true,
        hints: true,
        all: true,
        bandwidth: limit(4096),
        batch_size: 1 << 17,
        threads: 8,
    };
    assert_eq!(config.prefetch, wanted);

    let v2 = |rafs: &str, cache: &str| {
        Config::parse(&format!(
            r#"{{"version":2,"backend":{{"type":"localfs","localfs":{{"dir":"/b"}}}},
            "cache":{{"type":"filecache"{cache}}},"rafs":{{{rafs}}}}}"#
        ))
        .unwrap()
    };
    let rafs =
        r#""batch_size":268435456,"prefetch":{"enable":true,"bandwidth_limit":4096,"batch_size":131072}"#;
    wanted.all = false;
    let config = v2(rafs, "");
    assert_eq!((config.prefetch, config.read_ahead.amplify), (wanted, 256 << 20));
    // Either block asks, both limit.
    let cache = r#","prefetch":{"enable":true,"stream_prefetch":true,"bandwidth_limit":1024}"#;
    (wanted.all, wanted.bandwidth) = (true, limit(1024));
    assert_eq!(v2(rafs, cache).prefetch, wanted);
    let alone = v2("", cache).prefetch;
    assert_eq!((alone.enable, alone.all, alone.bandwidth), (true, true, limit(1024)));
    // A block that is off says nothing, not even wrong numbers.
    let off = r#","prefetch":{"enable":false,"threads":0,"batch_size":999999999}"#;
    assert_eq!(v2(rafs, off).prefetch.bandwidth, limit(4096));
}

#[test]
fn refusals_name_the_key() {
    let v1_with = |from: &str, to: &str| v1("").replace(from, to);
    for (text, key) in [
        (v1_with(r#""dir":"/b""#, ""), "device.backend.config.dir"),
        (v1_with("localfs", "nfs"), "device.backend.type"),
        (v1_with("blobcache", ""), "device.cache.type"),
        (v1_with("blobcache", "fscache"), "device.cache.type"),
        (
            v1_with(r#""cache":{"#, r#""cache":{"compressed":true,"#),
            "`device.cache.compressed` is not built yet",
        ),
        (
            v1_with(r#""work_dir":"/c""#, r#""enable_encryption":true"#),
            "device.cache.config.enable_encryption",
        ),
        (v1_with("direct", "fast"), "`mode`"),
        (v1(r#","fs_prefetch":{"enable":true,"threads_count":0}"#), "fs_prefetch.threads_count"),
        (v1(r#","fs_prefetch":{"enable":true,"merging_size":999999999}"#), "fs_prefetch.merging_size"),
        (v1(r#","amplify_io":999999999"#), "amplify_io"),
        (v1(r#","fs_prefetch":{"enable":true,"threads_count":1025}"#), "fs_prefetch.threads_count"),
        (v1(r#","fs_prefetch":{"bandwidth_rate":"1M"}"#), "fs_prefetch.bandwidth_rate"),
        (v1(r#","amplify_io":268435457"#), "amplify_io"),
        (v1(r#","prefer":"luck""#), "prefer"),
        (v1(r#","on_outage":"hope""#), "on_outage"),
        (v1(r#","read_timeout":0"#), "read_timeout"),
        (v1(r#","expect_root":"sha256:0""#), "expect_root"),
        (v1(r#","expect_bootstrap":"md5:0""#), "expect_bootstrap"),
        (v1(r#","id_mapping":[1,2]"#), "id_mapping"),
        (v1(r#","id_mapping":[0,4294967295,2]"#), "id_mapping"),
        (registry(r#","auth":"no base64!""#), "device.backend.config.auth"),
        (registry(r#","scheme":"ftp""#), "device.backend.config.scheme"),
        (registry(r#","mirrors":[{"host":""}]"#), "device.backend.config.mirrors[0].host"),
        (registry(r#","mirrors":[{"host":"http://u:pw@m"}]"#), "mirrors[0].host"),
        (registry(r#","mirrors":[{"host":"m"},{"host":"n","headers":{"a":1}}]"#), "mirrors[1].headers"),
        (registry(r#","client_cert_file":"a""#), "client_key_file"),
        (registry("").replace("\"repo\":\"r/x\"", "\"repo\":\"\""), "device.backend.config.repo"),
        ("{\"device\":".to_owned(), "not valid JSON"),
        ("key = ".to_owned(), "neither JSON nor TOML"),
        ("key = 1".to_owned(), "version = 2"),
        ("[]".to_owned(), "want an object"),
    ] {
        let error = Config::parse(&text).expect_err(&text).to_string();
        assert!(error.contains(key), "{text}: {error}");
    }
}

#[test]
fn secrets_stay_out_of_output() {
    let secret = "dXNlcjpodW50ZXIy";
    let text = registry(&format!(r#","auth":"{secret}","registry_token":"t0ken""#));
    let config = Config::parse(&text).unwrap();
    for shown in [config.public_json().to_string(), format!("{config:?}")] {
        assert!(!shown.contains(secret) && !shown.contains("t0ken"), "{shown}");
    }
    let bad = Config::parse(&registry(r#","auth":"c2VjcmV0""#)).unwrap_err().to_string();
    assert!(!bad.contains("c2VjcmV0") && !bad.contains("secret"), "{bad}");
}

/// A document of each format with `fields` of the backend `kind`.
fn with_backend(kind: &str, fields: &str) -> [String; 2] {
    [
        format!(
            r#"{{"device":{{"backend":{{"type":"{kind}","config":{{{fields}}}}},
                "cache":{{"type":"blobcache"}}}},"mode":"direct"}}"#
        ),
        format!(
            r#"{{"version":2,"backend":{{"type":"{kind}","{kind}":{{{fields}}}}},"cache":{{"type":"filecache"}}}}"#
        ),
    ]
}

const STORE: &str = r#""endpoint":"e:1","region":"r","bucket_name":"b""#;

#[test]
fn every_backend_is_read_from_both_formats() {
    let keys = r#","object_prefix":"p/","access_key_id":"kk1d","access_key_secret":"s3cret","timeout":7"#;
    for (kind, fields) in [
        ("localdisk", r#""device_path":"/dev/sdx","disable_gpt":true"#.to_owned()),
        ("s3", format!("{STORE}{keys}")),
        ("oss", format!(r#""scheme":"http",{}{keys}"#, STORE.replace(r#""region":"r","#, ""))),
        ("http-proxy", r#""addr":"/run/proxy.sock","path":"x","skip_verify":true"#.to_owned()),
    ] {
        for text in with_backend(kind, &fields) {
            let config = Config::parse(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(config.warnings.is_empty(), "{text}: {:?}", config.warnings);
            assert_eq!(config.backend.kind(), kind);
            let public = config.public_json();
            let (shown, debug) = (public.to_string(), format!("{config:?}"));
            for secret in ["kk1d", "s3cret"] {
                assert!(!shown.contains(secret) && !debug.contains(secret), "{shown} {debug}");
            }
            // What is shown is what was said, secrets and defaults aside.
            let said: Value = serde_json::from_str(&format!("{{{fields}}}")).unwrap();
            for (key, value) in said.as_object().unwrap() {
                let shown = &public["backend"][kind][key];
                assert!(shown == value || key.starts_with("access_key"), "{kind}.{key}: {shown}");
            }
        }
    }
}

#[test]
fn refusals_of_backends_name_the_key() {
    for (kind, fields, key) in [
        ("localdisk", r#""disable_gpt":true"#.to_owned(), "device_path"),
        ("localdisk", r#""device_path":"/d","disable_gpt":"no""#.to_owned(), "disable_gpt"),
        ("s3", STORE.replace(r#""endpoint":"e:1","#, ""), "endpoint"),
        ("s3", STORE.replace(r#""region":"r""#, r#""region":"""#), "region"),
        ("s3", STORE.replace(r#","bucket_name":"b""#, ""), "bucket_name"),
        ("oss", STORE.replace("e:1", ""), "endpoint"),
        ("s3", format!(r#"{STORE},"access_key_id":"kk1d""#), "access_key_secret"),
        ("oss", format!(r#"{STORE},"access_key_secret":"kk1d""#), "access_key_id"),
        (
            "s3",
            format!(
                r#"{STORE},"access_key_id":"kk1d","access_key_secret":"s","credentials_from_environment":true"#
            ),
            "credentials_from_environment",
        ),
        ("s3", format!(r#"{STORE},"scheme":"ftp""#), "scheme"),
        ("s3", format!(r#"{STORE},"proxy":{{"url":"http://p"}}"#), "proxy.url"),
        ("s3", format!(r#"{STORE},"retry_limit":99999999999"#), "retry_limit"),
        ("oss", format!(r#"{STORE},"ca_cert_files":"x""#), "ca_cert_files"),
        ("http-proxy", r#""path":"p""#.to_owned(), "addr"),
        ("http-proxy", r#""addr":"relative""#.to_owned(), "addr"),
        ("http-proxy", r#""addr":"http://kk1d:kk1d@h/""#.to_owned(), "addr"),
        ("nfs", String::new(), "type"),
    ] {
        for text in with_backend(kind, &fields) {
            let error = Config::parse(&text).expect_err(&text).to_string();
            assert!(error.contains(key), "{text}: {error}");
            assert!(!error.contains("kk1d"), "{error}");
        }
    }
    // Empty is AWS.
    assert!(Config::parse(&with_backend("s3", &STORE.replace("e:1", ""))[0]).is_ok());
}

#[test]
fn mirrors_and_a_proxy_are_read_and_keep_their_secrets() {
    let keys = r#","mirrors":[{"host":"http://m:5000","headers":{"x-key":"s3cr3t"},"failure_limit":2,"auth_through":true}],
        "proxy":{"url":"http://u:s3cr3t@p:3128","fallback":false,"use_http":true},"max_requests":8,"hedge":false"#;
    let config = Config::parse(&registry(keys)).unwrap();
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let BackendConfig::Registry(registry) = &config.backend else { panic!("{:?}", config.backend) };
    let mirror = &registry.mirrors[0];
    assert_eq!((mirror.host.as_str(), mirror.failure_limit, mirror.auth_through), ("http://m:5000", 2, true));
    assert_eq!(mirror.health_check_interval.as_secs(), 5);
    let proxy = registry.proxy.as_ref().unwrap();
    assert!(!proxy.fallback && proxy.use_http && proxy.check_pause_elapsed.as_secs() == 300);
    assert_eq!((registry.transport.max_requests, registry.transport.hedge), (8, false));
    let shown = format!("{:?} {:?} {}", mirror, proxy, config.backend.public_json());
    assert!(!shown.contains("s3cr3t") && shown.contains("http://m:5000"), "{shown}");
}
