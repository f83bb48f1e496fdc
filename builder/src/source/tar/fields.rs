//! The fields of tar headers and pax records, as bytes.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use crate::tree::Xattr;
use crate::{Error, Result};

/// A numeric field: octal digits between blanks and NULs, nothing at all (0), or, with the top
/// bit set, a two's complement number in base 256.
///
/// (The tar crate's reading of these fields fails on blank ones and cuts large ones short.)
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // Bit 7 marks the encoding, bit 6 is the sign.
        let start: i128 = if first & 0x40 != 0 { -1 } else { 0 };
        let top = i128::from(first & 0x3f) | start << 6;
        let value =
            field[1..].iter().try_fold(top, |v, &b| v.checked_mul(256)?.checked_add(i128::from(b)))?;
        return i64::try_from(value).ok();
    }
    let digits = field.split(|&b| b == 0).next()?.trim_ascii();
    digits.iter().try_fold(0i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

/// A decimal number without sign, as pax writes sizes and owners.
pub(super) fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(value).ok()?.parse().ok()
}

/// A pax time, `[-]SECONDS[.FRACTION]`: seconds rounded down and nanoseconds.
///
/// Digits beyond the ninth are dropped, as container runtimes do.
pub(super) fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&b| b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |n, i| n * 10 + u32::from(fraction.get(i).map_or(0, |b| b - b'0')));
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

/// The records of a pax header, `LENGTH KEY=VALUE\n` each, in order.
///
/// Values are bytes and may hold newlines (file capabilities do), so only the length delimits
/// them. (The tar crate splits at newlines.)
///
/// # Errors
/// `Corrupt`: a record is malformed.
pub(super) fn pax_records(mut data: &[u8]) -> Result<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    // Some writers pad with NULs.
    while data.first().is_some_and(|&b| b != 0) {
        let record = pax_record(data).ok_or_else(|| Error::bad_source("a malformed pax header"))?;
        records.push((record.0, record.1));
        data = record.2;
    }
    Ok(records)
}

fn pax_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = data.iter().take(20).position(|&b| b == b' ')?;
    let len = usize::try_from(decimal(&data[..blank])?).ok()?;
    let (record, rest) = data.split_at_checked(len)?;
    let record = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&b| b == b'=')?;
    (equals > 0).then_some((&record[..equals], &record[equals + 1..], rest))
}

/// libarchive writes base64 without padding; others pad.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The attribute of a `LIBARCHIVE.xattr.` record: its name is URL-encoded, its value base64.
pub(super) fn libarchive_xattr(name: &[u8], value: &[u8]) -> Option<Xattr> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let hex = str::from_utf8(tail.get(..2)?).ok()?;
            plain.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            plain.push(first);
            rest = tail;
        }
    }
    Some(Xattr { name: plain.into(), value: BASE64.decode(value).ok()?.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_encoding() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (b"0000644\0", Some(0o644)),
            (b"   755 \0", Some(0o755)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777", Some(0o77777777)),
            (b"12x4\0", None),
            (b"-1\0", None),
            (b"\x80\0\0\0\xff\xff\xff\xfe", Some(0xffff_fffe)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0", Some(-256)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (field, want) in cases {
            assert_eq!(number(field), *want, "{field:?}");
        }
    }

    #[test]
    fn times_round_down() {
        type Case = (&'static [u8], Option<(i64, u32)>);
        let cases: &[Case] = &[
            (b"1350244992.023960108", Some((1_350_244_992, 23_960_108))),
            (b"12", Some((12, 0))),
            (b"12.", Some((12, 0))),
            (b"12.5", Some((12, 500_000_000))),
            (b"12.1234567899", Some((12, 123_456_789))),
            (b"-1", Some((-1, 0))),
            (b"-0.25", Some((-1, 750_000_000))),
            (b"-1.0000000001", Some((-1, 0))),
            (b"", None),
            (b".5", None),
            (b"1e3", None),
            (b"--1", None),
            (b"1.-5", None),
            (b"9223372036854775808", None),
        ];
        for (value, want) in cases {
            assert_eq!(time(value), *want, "{value:?}");
        }
    }

    #[test]
    fn pax_values_may_hold_newlines_and_lengths_are_checked() {
        let records = pax_records(b"12 a=b\nc\n=d\n6 k=v\n\0\0").unwrap();
        assert_eq!(records, [(&b"a"[..], &b"b\nc\n=d"[..]), (b"k", b"v")]);
        for bad in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"6 a=bx",
            b"6 abc\n",
            b"x a=b\n",
            b"5 =b\n",
            b"99999999999999999999 a=b\n",
            b"2 a=b\n",
        ] {
            assert!(pax_records(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn libarchive_names_and_values_are_decoded() {
        let x = libarchive_xattr(b"user.a%3Db%00", b"aGk").unwrap();
        assert_eq!((&*x.name, &*x.value), (&b"user.a=b\0"[..], &b"hi"[..]));
        for (name, value) in [(&b"user.%zz"[..], &b"aGk="[..]), (b"user.%4", b"aGk="), (b"user.a", b"!!")] {
            assert!(libarchive_xattr(name, value).is_none());
        }
    }
}
