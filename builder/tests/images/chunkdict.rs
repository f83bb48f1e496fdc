//! `nydus-image chunkdict generate`: dictionaries hold what images share, and images can be built
//! with them.

use std::collections::{HashMap, HashSet};

use rafs::format::features::BlobFeatures;

use crate::layers::{File, Workshop, done, nydus_image, piece, random_layer};
use crate::random::Dice;

const FLAGS: [&str; 2] = ["--chunk-size", "0x1000"];

/// Generates `dict` from images as nydusify does, word for word; answers the ids in the summary.
fn generate(shop: &Workshop, sources: &[&str]) -> Vec<String> {
    let (dict, json, database) = (shop.at("dict"), shop.at("out.json"), shop.at("database.db"));
    let database = format!("sqlite://{database}");
    let sources: Vec<String> = sources.iter().map(|source| shop.at(source)).collect();
    let fixed =
        ["chunkdict", "generate", "--log-level", "warn", "--bootstrap", &dict, "--database", &database];
    let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
    let printed = done(&[&fixed[..], &["--output-json", &json], &sources].concat());
    assert_eq!(printed, b"");
    serde_json::from_value(shop.json("out.json")["blobs"].clone()).unwrap()
}

/// An image of one layer, `name` being `IMAGE:TAG/FILE`.
fn image(shop: &Workshop, name: &str, files: &[File], flags: &[&str]) {
    std::fs::create_dir_all(shop.path(name).parent().unwrap()).unwrap();
    shop.layer(name, files, flags);
}

fn files(first: u32, count: u32) -> Vec<File> {
    (first..first + count).map(|n| (format!("d/{n}"), piece(n))).collect()
}

/// Chunks of the dictionary: its files.
fn chunk_count(shop: &Workshop) -> usize {
    let archive = shop.archive("dict");
    let mut tar = tar::Archive::new(&archive[..]);
    tar.entries().unwrap().filter(|entry| entry.as_ref().unwrap().header().entry_type().is_file()).count()
}

#[test]
fn images_are_built_with_what_others_share() {
    for extra in [&[][..], &["--batch-size", "0x1000"], &["--fs-version", "5"], &["--features", "blob-toc"]] {
        let shop = Workshop::open();
        let flags = [&FLAGS[..], extra].concat();
        image(&shop, "app:v1/boot", &files(0, 30), &flags);
        image(&shop, "app:v2/boot", &files(20, 30), &flags);
        let named = generate(&shop, &["app:v1/boot", "app:v2/boot"]);
        let blobs = shop.opened("dict").blobs().to_vec();
        assert_eq!(named, shop.blobs("dict"));
        assert!(blobs.iter().all(|blob| blob.features.contains(BlobFeatures::IS_CHUNKDICT_GENERATED)));
        // Ten pieces are in both; one blob serves them all.
        assert_eq!((blobs.len(), chunk_count(&shop)), (1, 10), "{extra:?}");

        let dictionary = format!("bootstrap={}", shop.at("dict"));
        let with = [&flags[..], &["--chunk-dict", &dictionary]].concat();
        let mut new = files(15, 20);
        new.extend((90..95).map(|n| (format!("e/{n}"), piece(n))));
        shop.layer("plain", &new, &flags);
        shop.layer("with", &new, &with);
        assert_eq!(shop.archive("with"), shop.archive("plain"), "{extra:?}");
        let paths: Vec<String> = (15..35).map(|n| format!("d/{n}")).collect();
        if !extra.contains(&"5")
            && let Some(read) = shop.kernel_reads("with", &paths)
        {
            assert!((15..).zip(read).all(|(n, bytes)| bytes == piece(n)), "{extra:?}");
        }
        let used = shop.opened("with").blobs().to_vec();
        assert_eq!(used.len(), 2, "{extra:?}");
        assert!(used.iter().any(|blob| blob.id == blobs[0].id), "{extra:?}");
        assert!(used.iter().all(|blob| !blob.features.contains(BlobFeatures::IS_CHUNKDICT_GENERATED)));
        let own = used.iter().find(|blob| blob.id != blobs[0].id).unwrap();
        assert_eq!(own.chunk_count, 15, "ten of 25 pieces are the dictionary's, {extra:?}");
        shop.layer("upper", &files(22, 3), &with);
        shop.merge("merged", &["with", "upper"], &["--chunk-dict", &dictionary]);
        assert!(shop.blobs("merged").contains(&blobs[0].id.to_string()));
        assert!(shop.archive("merged").len() > 1024);
    }
}

#[test]
fn shared_is_what_two_versions_have() {
    for seed in 0..8 {
        let mut dice = Dice::new(seed);
        let shop = Workshop::open();
        let mut versions: HashMap<String, HashSet<Vec<u8>>> = HashMap::new();
        let mut names = Vec::new();
        for n in 0..2 + dice.roll(4) {
            // Some are of the same version.
            let version = format!("app:v{}", dice.roll(3));
            let files = random_layer(&mut dice);
            let chunks = files.iter().flat_map(|(_, bytes)| bytes.chunks(0x1000)).map(<[u8]>::to_vec);
            versions.entry(version.clone()).or_default().extend(chunks);
            names.push(format!("{version}/boot{n}"));
            image(&shop, &names[n as usize], &files, &FLAGS);
        }
        let mut counts: HashMap<&Vec<u8>, u32> = HashMap::new();
        versions.values().flatten().for_each(|chunk| *counts.entry(chunk).or_default() += 1);
        let shared = counts.values().filter(|&&count| count > 1).count();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        generate(&shop, &names);
        assert_eq!(chunk_count(&shop), shared, "seed {seed}, {names:?}");
        let first = std::fs::read(shop.path("dict")).unwrap();
        generate(&shop, &names);
        assert_eq!(first, std::fs::read(shop.path("dict")).unwrap());
    }
}

#[test]
fn images_with_nothing_in_common_give_an_empty_dictionary() {
    let shop = Workshop::open();
    image(&shop, "app:v1/boot", &files(0, 5), &FLAGS);
    image(&shop, "app:v2/boot", &files(10, 5), &FLAGS);
    // What is encrypted is in common, but its key would be, too.
    let encrypted = [&FLAGS[..], &["--encrypt"]].concat();
    image(&shop, "secret:v1/boot", &files(0, 5), &encrypted);
    image(&shop, "secret:v2/boot", &files(0, 6), &encrypted);
    for sources in
        [&["app:v1/boot", "app:v2/boot"][..], &["app:v1/boot"], &["secret:v1/boot", "secret:v2/boot"]]
    {
        assert_eq!(generate(&shop, sources), Vec::<String>::new());
        assert_eq!(shop.archive("dict").len(), 1024, "an archive without entries");
    }
    let dictionary = shop.at("dict");
    shop.layer("with", &files(0, 5), &[&FLAGS[..], &["--chunk-dict", &dictionary]].concat());
    assert_eq!(shop.blobs("with").len(), 1);
}

#[test]
fn memory_will_do_and_blobs_are_listed() {
    let shop = Workshop::open();
    image(&shop, "a:1/boot", &files(0, 5), &FLAGS);
    image(&shop, "b:1/boot", &files(0, 7), &FLAGS);
    let (dir, a, b) = (shop.at("dicts"), shop.at("a:1/boot"), shop.at("b:1/boot"));
    let printed =
        done(&["chunkdict", "generate", "-v", "--database", "sqlite://:memory:", "-D", &dir, &a, &b]);
    assert_eq!(shop.count("dicts"), 1);
    // Both blobs have all five; of equals the one with the lower name is taken.
    let id = shop.blobs("a:1/boot").into_iter().chain(shop.blobs("b:1/boot")).min().unwrap();
    assert_eq!(String::from_utf8(printed).unwrap(), format!("{id} 5 20480\n"));
}

#[test]
fn what_can_not_be_one_dictionary_is_refused() {
    let shop = Workshop::open();
    image(&shop, "a:1/boot", &files(0, 5), &FLAGS);
    image(&shop, "b:1/boot", &files(0, 5), &["--chunk-size", "0x2000"]);
    image(&shop, "c:1/boot", &files(0, 5), &[&FLAGS[..], &["--digester", "sha256"]].concat());
    std::fs::write(shop.path("tar"), crate::layers::tar_of(&files(0, 5))).unwrap();
    let (tar, tarfs, id) = (shop.at("tar"), shop.at("tarfs"), "1".repeat(64));
    done(&["create", "--type", "tar-tarfs", "-B", &tarfs, "--blob-id", &id, &tar]);
    let dict = shop.at("dict");
    let (a, b, c) = (shop.at("a:1/boot"), shop.at("b:1/boot"), shop.at("c:1/boot"));
    for (arguments, code, said) in [
        (&["-B", &dict, &a, &b][..], 2, "chunk size"),
        (&["-B", &dict, &a, &c], 2, "sha256"),
        (&["-B", &dict, &tarfs], 1, "plain tar"),
        (&["-B", &dict, &tar], 1, "tar"),
        (&["-B", &dict, "--database", "dict.db", &a], 1, "sqlite:///PATH"),
        (&["-B", &dict], 2, "SOURCE"),
        (&[&a], 2, "--bootstrap"),
    ] {
        let output = nydus_image(&[&["chunkdict", "generate"], arguments].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    assert_eq!(nydus_image(&["chunkdict"]).status.code(), Some(2));
    assert!(!shop.path("dict").exists());
}
