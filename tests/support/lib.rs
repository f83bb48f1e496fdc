//! What the journeys share: image recipes, registries, mounts, comparison.
