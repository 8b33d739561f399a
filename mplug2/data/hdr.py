"""High dynamic range (PQ and HLG, ITU-R BT.2100) to standard dynamic range, for frames of video.

    RGB codes --to_light--> light, 1 = reference white --BT.2020 to BT.709--> --compress--> sRGB codes

Reference white is 203 cd/m² (ITU-R BT.2408), so that what is not brighter looks as it does in a standard video.
"""

import numpy as np

TRANSFERS = {16: "pq", 18: "hlg"}  # by the number of the transfer characteristic (ITU-T H.273)
REFERENCE_WHITE, HLG_PEAK = 203.0, 1000.0  # cd/m²
LUMINANCE = np.float32([0.2627, 0.6780, 0.0593])  # of red, green and blue in BT.2020
BT2020_TO_BT709 = np.float32(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)
KNEE = 0.75


def to_sdr(codes: np.ndarray, transfer: str) -> np.ndarray:
    """uint16 (H, W, 3), RGB codes of BT.2020 in "pq" or "hlg", to uint8 (H, W, 3), sRGB."""
    light = (PQ_LIGHT if transfer == "pq" else HLG_LIGHT)[codes]
    if transfer == "hlg":  # the system gamma, 1.2, acts on the luminance
        light *= HLG_PEAK / REFERENCE_WHITE * (light @ LUMINANCE)[..., None] ** 0.2
    light = np.maximum(light @ BT2020_TO_BT709.T, 0)
    # Above the knee, light approaches white without ever reaching it, so that highlights keep some detail.
    excess = np.maximum(light - KNEE, 0) / (1 - KNEE)
    light = np.minimum(light, KNEE) + (1 - KNEE) * excess / (1 + excess)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _pq_light(codes: np.ndarray) -> np.ndarray:
    """Perceptual quantizer (SMPTE ST 2084): display light, as a multiple of reference white."""
    root = codes ** (1 / 78.84375)
    return (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125) * (
        10000 / REFERENCE_WHITE)


def _hlg_light(codes: np.ndarray) -> np.ndarray:
    """Hybrid log-gamma (ARIB STD-B67): scene light from 0 to 1."""
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - 0.55991073) / 0.17883277) + 0.28466892) / 12)


_CODES = np.arange(65536) / 65535
PQ_LIGHT, HLG_LIGHT = _pq_light(_CODES).astype(np.float32), _hlg_light(_CODES).astype(np.float32)
