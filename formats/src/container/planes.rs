//! Byte planes: the bytes of equal significance of all elements, one plane after the other.
//!
//! An element of `w` bytes is read as a little-endian number. Floats are rotated left by one bit
//! first, which puts the sign behind the mantissa, so that the exponent of a bf16 or f32 is a byte of
//! its own. Plane 0 takes the most significant bytes, plane `w - 1` the least significant.
//!
//! With a mask, zeros (all bits clear, so not `-0.0`) leave no bytes in the planes; the mask has a
//! bit for each element, set where one is kept, lowest bit first. Unused bits of its last byte are 0.

use crate::DType;

/// How elements of a component are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    /// Bytes of an element: 1, 2, 4 or 8.
    pub(super) width: usize,
    rotate: bool,
}

impl Split {
    /// The split that the format prescribes for an element type.
    pub(super) fn of(dtype: DType) -> Self {
        let rotate = matches!(dtype, DType::F16 | DType::Bf16 | DType::F32 | DType::F64);
        Self { width: dtype.size_bytes(), rotate }
    }

    /// Splits `raw`, whole elements, into one plane after the other.
    pub(super) fn split(self, raw: &[u8]) -> Vec<u8> {
        match self.width {
            2 => split::<2>(raw, self.rotate),
            4 => split::<4>(raw, self.rotate),
            8 => split::<8>(raw, self.rotate),
            _ => raw.to_vec(),
        }
    }

    /// The elements of planes that [`split`](Self::split) made.
    pub(super) fn join(self, planes: &[u8]) -> Vec<u8> {
        match self.width {
            2 => join::<2>(planes, self.rotate),
            4 => join::<4>(planes, self.rotate),
            8 => join::<8>(planes, self.rotate),
            _ => planes.to_vec(),
        }
    }

    /// The mask of `raw` and its elements that are not zero, when both together are shorter.
    pub(super) fn squeeze(self, raw: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        match self.width {
            1 => squeeze::<1>(raw),
            2 => squeeze::<2>(raw),
            4 => squeeze::<4>(raw),
            _ => squeeze::<8>(raw),
        }
    }

    /// Puts zeros back: `count` elements, of which `kept` are where the mask has a bit. The mask has
    /// as many bits set as there are elements in `kept`.
    pub(super) fn spread(self, mask: &[u8], kept: &[u8], count: usize) -> Vec<u8> {
        match self.width {
            1 => spread::<1>(mask, kept, count),
            2 => spread::<2>(mask, kept, count),
            4 => spread::<4>(mask, kept, count),
            _ => spread::<8>(mask, kept, count),
        }
    }
}

/// Elements that a mask keeps, or what is wrong with it.
pub(super) fn kept(mask: &[u8], count: usize) -> Result<usize, &'static str> {
    let unused = mask.len() * 8 - count;
    if let Some(last) = mask.last()
        && unused > 0
        && last >> (8 - unused) != 0
    {
        return Err("the mask has bits set behind the last element");
    }
    Ok(mask.iter().map(|byte| byte.count_ones() as usize).sum())
}

fn elements<const W: usize>(raw: &[u8]) -> &[[u8; W]] {
    raw.as_chunks().0
}

fn split<const W: usize>(raw: &[u8], rotate: bool) -> Vec<u8> {
    let elements = elements::<W>(raw);
    let mut out = Vec::with_capacity(raw.len());
    for plane in (0..W).rev() {
        // The byte below it lends the bit that the rotation shifts in.
        let below = if plane == 0 { W - 1 } else { plane - 1 };
        if rotate {
            out.extend(elements.iter().map(|e| e[plane] << 1 | e[below] >> 7));
        } else {
            out.extend(elements.iter().map(|e| e[plane]));
        }
    }
    out
}

fn join<const W: usize>(planes: &[u8], rotate: bool) -> Vec<u8> {
    let count = planes.len() / W;
    let mut out = vec![0; planes.len()];
    let elements = out.as_chunks_mut::<W>().0;
    for byte in 0..W {
        let plane = |significance: usize| {
            let start = (W - 1 - significance) * count;
            &planes[start..start + count]
        };
        if rotate {
            let (own, above) = (plane(byte), plane((byte + 1) % W));
            for ((element, own), above) in elements.iter_mut().zip(own).zip(above) {
                element[byte] = own >> 1 | above << 7;
            }
        } else {
            for (element, own) in elements.iter_mut().zip(plane(byte)) {
                element[byte] = *own;
            }
        }
    }
    out
}

fn squeeze<const W: usize>(raw: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let elements = elements::<W>(raw);
    let zeros = elements.iter().filter(|element| **element == [0; W]).count();
    let mask_bytes = elements.len().div_ceil(8);
    if zeros * W <= mask_bytes {
        return None;
    }
    let mut mask = vec![0; mask_bytes];
    let mut kept = vec![[0; W]; elements.len() - zeros + 1];
    let mut next = 0;
    for (byte, group) in mask.iter_mut().zip(elements.chunks(8)) {
        for (bit, element) in group.iter().enumerate() {
            let keep = *element != [0; W];
            *byte |= u8::from(keep) << bit;
            // Written in any case and kept by advancing: no branch that the pattern decides.
            kept[next] = *element;
            next += usize::from(keep);
        }
    }
    kept.truncate(next);
    Some((mask, kept.into_flattened()))
}

fn spread<const W: usize>(mask: &[u8], kept: &[u8], count: usize) -> Vec<u8> {
    let mut out = vec![[0; W]; count];
    let kept = elements::<W>(kept);
    let mut next = 0;
    for (byte, group) in mask.iter().zip(out.chunks_mut(8)) {
        for (bit, element) in group.iter_mut().enumerate() {
            let keep = byte >> bit & 1 != 0;
            if keep && let Some(value) = kept.get(next) {
                *element = *value;
            }
            next += usize::from(keep);
        }
    }
    out.into_flattened()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTHS: [DType; 8] = [
        DType::U8,
        DType::F16,
        DType::Bf16,
        DType::I16,
        DType::F32,
        DType::U32,
        DType::F64,
        DType::I64,
    ];

    #[test]
    fn the_exponent_of_a_bf16_is_plane_0() {
        // -1.5: sign 1, exponent 0x7f, mantissa 0x40.
        let planes = Split::of(DType::Bf16).split(&[0xc0, 0xbf, 0x80, 0x3f]);
        assert_eq!(planes, [0x7f, 0x7f, 0x81, 0x00]);
        // A whole number is not rotated.
        assert_eq!(Split::of(DType::I16).split(&[0xc0, 0xbf]), [0xbf, 0xc0]);
    }

    #[test]
    fn a_mask_is_used_when_it_saves_bytes_and_minus_zero_is_a_value() {
        let split = Split::of(DType::Bf16);
        let raw = [0, 0, 0, 0x80, 0, 0, 0x80, 0x3f, 0, 0];
        let (mask, kept) = split.squeeze(&raw).unwrap();
        assert_eq!(mask, [0b01010]);
        assert_eq!(kept, [0, 0x80, 0x80, 0x3f]);
        assert_eq!(split.spread(&mask, &kept, 5), raw);
        // One zero in 16 elements: two bytes saved, two bytes of mask.
        let mut raw = [1; 32];
        raw[..2].fill(0);
        assert_eq!(split.squeeze(&raw), None);
        assert_eq!(
            super::kept(&[0b1_0000], 4),
            Err("the mask has bits set behind the last element")
        );
        assert_eq!(super::kept(&[0b1010, 1], 9), Ok(3));
    }

    #[test]
    fn every_16_bit_pattern_survives() {
        let raw: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [DType::Bf16, DType::F16, DType::U16] {
            let split = Split::of(dtype);
            assert_eq!(split.join(&split.split(&raw)), raw);
        }
    }

    proptest! {
        #[test]
        fn planes_and_masks_give_back_every_bit(
            which in 0..WIDTHS.len(),
            bytes in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..400),
        ) {
            let split = Split::of(WIDTHS[which]);
            let raw = &bytes[..bytes.len() / split.width * split.width];
            prop_assert_eq!(split.join(&split.split(raw)), raw);
            if let Some((mask, kept)) = split.squeeze(raw) {
                let count = raw.len() / split.width;
                prop_assert!(mask.len() + kept.len() < raw.len());
                prop_assert_eq!(super::kept(&mask, count), Ok(kept.len() / split.width));
                prop_assert_eq!(split.spread(&mask, &kept, count), raw);
            }
        }
    }
}
