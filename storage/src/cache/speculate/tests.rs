//! Credit, seeds and moods.

use super::*;

fn state() -> State {
    let mut state = State::default();
    state.plant(0, 10, 20);
    state.plant(1, 10, 20);
    state.plant(0, 40, 50);
    state
}

#[test]
fn seeds_that_meet_become_one() {
    let mut state = state();
    // Not beside one, and not of another blob.
    state.plant(0, 30, 31);
    assert_eq!(state.seeds.len(), 4);
    state.plant(0, 20, 30);
    assert_eq!((state.seeds[0].low, state.seeds[0].high, state.seeds.len()), (10, 31, 3));
    let (mut seed, place) = state.take_best(Some(0)).unwrap();
    seed.high = 45;
    seed.ended = true;
    state.put_back(seed, place);
    let seed = &state.seeds[place];
    assert_eq!((seed.low, seed.high, seed.ended, state.seeds.len()), (10, 50, true, 2));
}

#[test]
fn a_seed_that_proves_right_goes_first_and_remembers_it() {
    let mut state = state();
    state.seeds.iter_mut().for_each(|seed| seed.steps = 3);
    assert_eq!(state.proved_right(0, 9, 7), None);
    assert_eq!(state.proved_right(0, 20, 7), None);
    assert_eq!(state.proved_right(1, 10, 7), Some(Growth::Open));
    let (best, _) = state.take_best(None).unwrap();
    assert_eq!((best.blob, best.steps, best.proved), (1, 0, 7));
    (state.seeds[0].begun, state.seeds[0].ended) = (true, true);
    assert_eq!(state.proved_right(0, 40, 1), Some(Growth::Ended));
}

#[test]
fn guesses_follow_trust_and_what_counts() {
    let link = Link::new();
    let mood = |speculator: &Speculator| speculator.mood(&link, &speculator.lock());
    let time = Speculator::new(ReadAhead::default());
    let bytes = Speculator::new(ReadAhead { prefer: Prefer::Bytes, ..ReadAhead::default() });
    assert_eq!((mood(&time), mood(&bytes)), (Mood::Free, Mood::Careful));
    time.told(8_000);
    assert_eq!(mood(&time), Mood::Guided);
    time.lock().distrust(999);
    assert_eq!(mood(&time), Mood::Guided);
    time.lock().distrust(1);
    assert_eq!(mood(&time), Mood::Free);
    let order = time.telling();
    time.lock().distrust(1);
    assert_eq!(mood(&time), Mood::Guided);
    drop(order);
    assert_eq!(mood(&time), Mood::Free);
    time.guide(Duration::from_secs(3600));
    assert_eq!(mood(&time), Mood::Guided);
    time.lock().credit = MAX_CREDIT;
    let guided = mood(&time);
    time.lock().restrain(guided);
    assert_eq!(time.lock().credit, GUIDED_CREDIT);
    time.guide(Duration::ZERO);
    assert_eq!(mood(&time), Mood::Free);
    // Before anything is known of the link, a miss is widened; where bytes count, on credit only.
    assert!(time.widening(&link) > 0);
    bytes.lock().credit = 0.0;
    assert_eq!(bytes.widening(&link), 0);
    // Whoever is this near is asked again.
    drop(link.answered(NEAR / 2, false));
    assert_eq!(mood(&time), Mood::Careful);
}

#[test]
fn steps_grow_with_what_proves_right() {
    let link = Link::new();
    let speculator = Speculator::new(ReadAhead::default());
    speculator.lock().plant(0, 0, 9);
    assert_eq!(speculator.max_step(&link), FIRST_STEP);
    speculator.lock().proved_right(0, 0, 4 * FIRST_STEP);
    assert_eq!(speculator.max_step(&link), 2 * FIRST_STEP);
    speculator.lock().proved_right(0, 0, 4 * MAX_STEP);
    assert_eq!(speculator.max_step(&link), MAX_STEP);
    speculator.told(1);
    assert_eq!(speculator.max_step(&link), FIRST_STEP);
}
