//! The tree of mounts without a kernel.

use std::path::Path;

use rafs::bootstrap::{Bootstrap, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use storage::read::{Completion, ReadSlice, Reader};

use super::*;

struct NoData;

impl Reader for NoData {
    fn try_read(&self, _: &[ReadSlice], _: &mut [u8]) -> storage::Result<bool> {
        Ok(false)
    }

    fn submit(&self, _: Vec<ReadSlice>, _: storage::backend::Priority, _: Completion) {}
}

fn image(name: &str) -> Arc<Rafs> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("image.boot");
    let options = OpenOptions::default();
    let bytes = std::fs::read(path).unwrap();
    let bootstrap: Arc<dyn Bootstrap> = Arc::from(rafs::bootstrap::from_bytes(bytes, &options).unwrap());
    Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap())
}

fn path(text: &str) -> VfsPath {
    VfsPath::parse(text).unwrap()
}

fn build(at: &str, image: &Arc<Rafs>) -> impl FnOnce(Place) -> Mount {
    let (at, image) = (at.to_owned(), Arc::clone(image));
    move |place| Mount::for_tests_at(&at, place, image, Arc::new(NoData))
}

fn attach(vfs: &Vfs, at: &str, image: &Arc<Rafs>) -> (Arc<Mount>, Vec<Stale>) {
    let (mounted, stale) = vfs.attach(&path(at), build(at, image)).unwrap();
    (Arc::clone(mounted.image().unwrap()), stale)
}

/// What is shown at `at`, from name to name.
fn walk(vfs: &Vfs, at: &str) -> Option<Node> {
    let mut node = vfs.resolve(NodeId::ROOT)?;
    for name in path(at).names() {
        node = match (node.own().and_then(|number| vfs.child(number, name.as_bytes())), node) {
            (Some(child), _) => child.node,
            (None, Node::Own(_) | Node::Host { .. }) => return None,
            (None, Node::Image { mount, nid, .. }) => {
                let nid = mount.rafs().bootstrap().lookup(nid, name.as_bytes()).unwrap()?.nid;
                Node::Image { mount, nid, own: None }
            }
        };
    }
    Some(node)
}

fn shows(vfs: &Vfs, at: &str, mount: &Arc<Mount>) -> bool {
    let root = mount.rafs().bootstrap().root();
    matches!(walk(vfs, at), Some(Node::Image { mount: found, nid, .. }) if Arc::ptr_eq(&found, mount) && nid == root)
}

fn entry(parent: NodeId, name: &str) -> Stale {
    Stale::Entry { parent, name: name.as_bytes().to_vec() }
}

/// A directory of the golden trees that has entries.
fn some_directory(image: &Rafs) -> (String, Nid) {
    let mut found = None;
    let bootstrap = image.bootstrap();
    bootstrap
        .children(bootstrap.root(), 0, &mut |child| {
            if child.file_type == rafs::bootstrap::FileType::Directory {
                found = Some((String::from_utf8(child.name.to_vec()).unwrap(), child.nid));
                return std::ops::ControlFlow::Break(());
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    found.unwrap()
}

#[test]
fn an_index_rests_until_the_kernel_has_forgotten_it() {
    let (vfs, empty) = (Vfs::default(), image("empty"));
    let (first, _) = attach(&vfs, "/", &empty);
    assert_eq!((first.place().index, first.place().generation), (MountIndex(1), 0));
    assert_eq!(first.node(empty.bootstrap().root()), Some(NodeId::ROOT));
    first.place().lookups.take(3);
    let node = NodeId::new(MountIndex(1), Nid(77)).unwrap();
    vfs.detach(&path("/")).unwrap();
    assert!(matches!(vfs.resolve(NodeId::ROOT), Some(Node::Own(_))), "the root is the daemon's own again");
    assert!(vfs.resolve(node).is_some(), "open files are served on");
    assert!(vfs.mounts().is_empty());
    assert_eq!(attach(&vfs, "/b", &empty).0.place().index, MountIndex(2), "three nodes are still held");
    vfs.forget(node, 2);
    assert_eq!(attach(&vfs, "/c", &empty).0.place().index, MountIndex(3));
    vfs.forget(node, 1);
    assert!(vfs.resolve(node).is_none());
    assert_eq!(attach(&vfs, "/d", &empty).0.place().index, MountIndex(4), "somebody is at work on it");
    drop(first);
    let (again, _) = attach(&vfs, "/e", &empty);
    assert_eq!((again.place().index, again.place().generation), (MountIndex(1), 1));
    // More than was given: the count stays at zero.
    vfs.forget(node, 5);
    assert_eq!(again.place().lookups.held(), 0);
    vfs.forget(NodeId(u64::MAX), 1);
    assert!(vfs.detach(&path("/nowhere")).is_err());
}

#[test]
fn the_kernel_is_told_of_the_topmost_change() {
    let (vfs, empty, tree) = (Vfs::default(), image("empty"), image("none-4k"));
    let (dir, dir_nid) = some_directory(&tree);
    let (mount, stale) = attach(&vfs, "/a/b", &empty);
    assert_eq!(stale, [entry(NodeId::ROOT, "a"), Stale::Node(NodeId::ROOT)]);
    let Some(Node::Own(a)) = walk(&vfs, "/a") else { panic!("/a is no directory of ours") };
    assert!(a >= FIRST_DIRECTORY && shows(&vfs, "/a/b", &mount));
    // A neighbour.
    let (_, stale) = attach(&vfs, "/a/c", &empty);
    assert_eq!(stale, [entry(NodeId(a), "c"), Stale::Node(NodeId(a))]);
    // On top of what leads to them: still there.
    let (outer, stale) = attach(&vfs, "/a", &tree);
    assert_eq!(stale, [entry(NodeId::ROOT, "a"), Stale::Node(NodeId::ROOT)]);
    assert!(shows(&vfs, "/a", &outer) && shows(&vfs, "/a/b", &mount));
    // In a directory of an image, which keeps its node.
    let below = format!("/a/{dir}/new");
    let (inner, stale) = attach(&vfs, &below, &empty);
    let parent = outer.node(dir_nid).unwrap();
    assert_eq!(stale, [entry(parent, "new"), Stale::Node(parent)]);
    assert!(shows(&vfs, &below, &inner));
    assert!(
        matches!(walk(&vfs, &format!("/a/{dir}")), Some(Node::Image { nid, own: Some(_), .. }) if nid == dir_nid)
    );
    // Another image in the middle.
    let (replaced, stale) = vfs.replace(&path("/a"), build("/a", &empty)).unwrap();
    assert!(Arc::ptr_eq(replaced.old.image().unwrap(), &outer));
    assert_eq!(stale, [entry(NodeId::ROOT, "a"), Stale::Node(NodeId::ROOT)]);
    assert!(matches!(walk(&vfs, &format!("/a/{dir}")), Some(Node::Own(_))));
    assert!(shows(&vfs, &below, &inner));
    // Directories go with the last mount below them.
    vfs.detach(&path(&below)).unwrap();
    assert!(walk(&vfs, &format!("/a/{dir}")).is_none());
    for at in ["/a/b", "/a", "/a/c"] {
        assert!(walk(&vfs, "/a").is_some(), "{at}");
        vfs.detach(&path(at)).unwrap();
    }
    assert!(walk(&vfs, "/a").is_none());
}

#[test]
fn the_root_is_looked_up_name_by_name() {
    let (vfs, empty, tree) = (Vfs::default(), image("empty"), image("none-4k"));
    let (dir, dir_nid) = some_directory(&tree);
    attach(&vfs, "/own", &empty);
    let (inner, _) = attach(&vfs, &format!("/{dir}/new"), &empty);
    let (root, stale) = attach(&vfs, "/", &tree);
    assert!(stale.contains(&entry(NodeId::ROOT, &dir)), "what was ours is the image's now: {stale:?}");
    assert!(!stale.contains(&entry(NodeId::ROOT, "own")) && stale.ends_with(&[Stale::Node(NodeId::ROOT)]));
    let names = stale.len() - 1;
    let mut children = 0;
    let bootstrap = tree.bootstrap();
    bootstrap
        .children(bootstrap.root(), 0, &mut |_| {
            children += 1;
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(names, children);
    assert!(shows(&vfs, "/", &root) && shows(&vfs, &format!("/{dir}/new"), &inner));
    assert_eq!(root.ino(dir_nid), dir_nid.0, "the image at the root keeps its inode numbers");
    assert_ne!(inner.ino(dir_nid), dir_nid.0);
    let (_, stale) = vfs.detach(&path("/")).unwrap();
    assert_eq!(stale.len() - 1, children);
    assert!(shows(&vfs, &format!("/{dir}/new"), &inner));
}

#[test]
fn a_thousand_mounts_list_in_pieces() {
    let (vfs, empty) = (Vfs::default(), image("empty"));
    for number in 0..1000 {
        attach(&vfs, &format!("/all/{number}"), &empty);
    }
    let Some(Node::Own(all)) = walk(&vfs, "/all") else { panic!("/all is no directory of ours") };
    assert_eq!(vfs.count(all), Some(1000));
    let first = vfs.children(all, 0);
    assert_eq!(first.len(), 1000);
    // From a cursor on, also when what was there has gone.
    vfs.detach(&path("/all/10")).unwrap();
    let rest = vfs.children(all, first[10].number);
    assert_eq!(
        rest.iter().map(|child| child.number).collect::<Vec<_>>(),
        first[11..].iter().map(|c| c.number).collect::<Vec<_>>()
    );
}

#[test]
fn saved_trees_keep_their_nodes() {
    let (vfs, empty, tree) = (Vfs::default(), image("empty"), image("none-4k"));
    for at in ["/gone", "/a/b/c", "/a", "/x"] {
        attach(&vfs, at, if at == "/a" { &tree } else { &empty });
    }
    vfs.detach(&path("/gone")).unwrap();
    let saved = vfs.save();
    let text = serde_json::to_string(&saved).unwrap();
    let saved: command::SavedVfs = serde_json::from_str(&text).unwrap();
    let successor = Vfs::default();
    successor.restore(&saved).unwrap();
    for mount in &saved.mounts {
        let image = if mount.mountpoint == "/a" { &tree } else { &empty };
        successor.restore_mount(mount, build(&mount.mountpoint, image)).unwrap();
        assert!(successor.restore_mount(mount, build(&mount.mountpoint, image)).is_err(), "twice");
    }
    let again = successor.save();
    assert_eq!((again.mounts, again.directories), (saved.mounts.clone(), saved.directories.clone()));
    for at in ["/a", "/a/b", "/a/b/c", "/x"] {
        let node = |vfs: &Vfs| match walk(vfs, at).unwrap() {
            Node::Own(number) => NodeId(number),
            Node::Image { mount, nid, .. } => mount.node(nid).unwrap(),
            Node::Host { .. } => panic!("nothing of the host is mounted"),
        };
        assert_eq!(node(&vfs), node(&successor), "{at}");
    }
    // What the predecessor has used, or may have since, is not used again.
    let (since, _) = attach(&vfs, "/since/then", &empty);
    let (new, _) = attach(&successor, "/new", &empty);
    assert_eq!(new.place().index.0, saved.next_index);
    assert!(since.place().index < new.place().index);
    let number = |vfs: &Vfs, at| vfs.save().directories.iter().find(|(path, _)| path == at).unwrap().1;
    assert!(number(&vfs, "/since/then") < number(&successor, "/new"));
    let damaged = |edit: &dyn Fn(&mut command::SavedVfs)| {
        let mut other = saved.clone();
        edit(&mut other);
        Vfs::default().restore(&other).is_err()
    };
    // Whatever is in a path, nothing panics.
    assert!(!damaged(&|s| s.directories.push(("/é//".to_owned(), FIRST_DIRECTORY))));
    // The predecessor's references are not known: what is open of this mount is served after its end.
    let (gone, _) = successor.detach(&path("/x")).unwrap();
    let node = NodeId::new(gone.place().index, Nid(77)).unwrap();
    drop(gone);
    successor.sweep();
    successor.forget(node, 1);
    attach(&successor, "/another", &empty);
    assert!(successor.resolve(node).is_some(), "an open file of /x is lost");
    assert!(damaged(&|s| s.next_index = 0));
    assert!(damaged(&|s| s.directories.retain(|(path, _)| path != "/a")));
    assert!(damaged(&|s| s.directories[0].1 = 7));
    assert!(damaged(&|s| s.directories.push(("/a".to_owned(), s.next_directory - 1))));
    assert!(damaged(&|s| s.directories.push(("/b".to_owned(), s.directories[0].1))));
    assert!(damaged(&|s| s.next_directory = u64::MAX));
}

/// The root's inode is the kernel's for the connection's life, whoever is mounted there; an answer with
/// another generation would make the kernel take it for a bad one.
#[test]
fn the_root_is_the_same_inode_for_every_mount() {
    use fuse_backend_rs::api::filesystem::{Context, FileSystem as _};
    let (adapter, tree) = (crate::adapter::Adapter::default(), image("none-4k"));
    let (dir, dir_nid) = some_directory(&tree);
    let name = std::ffi::CString::new(dir).unwrap();
    for generation in 0..3 {
        let (mount, _) = attach(adapter.table(), "/", &tree);
        assert_eq!((mount.place().index, mount.place().generation), (MountIndex(1), generation));
        let context = Context::default();
        let entry = adapter.lookup(&context, NodeId::ROOT.0, &name).unwrap();
        assert_eq!((entry.inode, entry.generation), (mount.node(dir_nid).unwrap().0, generation));
        let up = adapter.lookup(&context, entry.inode, c"..").unwrap();
        assert_eq!((up.inode, up.generation), (NodeId::ROOT.0, 0));
        adapter.forget(&context, entry.inode, 1);
        adapter.table().detach(&path("/")).unwrap();
        drop(mount);
        adapter.table().sweep();
    }
}

/// The kernel is told that there are no extended attributes only while one image is all there is.
#[test]
fn extended_attributes_are_refused_for_good_only_where_nothing_comes_later() {
    let shared = Vfs::default();
    assert!(!shared.is_dedicated() && !shared.refuse_xattrs() && shared.share());
    let early = Vfs::default();
    early.dedicate();
    assert!(early.is_dedicated() && early.share() && !early.refuse_xattrs());
    let late = Vfs::default();
    late.dedicate();
    assert!(late.refuse_xattrs() && late.refuse_xattrs(), "it is told again to who asks at once");
    assert!(!late.share() && late.refuse_xattrs(), "what the kernel was told holds");
}
