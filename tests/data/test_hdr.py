"""HDR frames: codes of BT.2100 against its formulas and the reference levels of BT.2408."""

import numpy as np
import pytest

from mplug2.data.hdr import to_sdr


def pq_code(light: float) -> float:
    """Inverse of the perceptual quantizer: cd/m² to a code from 0 to 1 (BT.2100, table 4)."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def convert(transfer: str, *codes: tuple[float, float, float] | float) -> np.ndarray:
    """RGB codes from 0 to 1, one pixel each; a number is a gray."""
    image = np.array([np.broadcast_to(code, 3) for code in codes])[None]
    return to_sdr(np.rint(65535 * image).astype(np.uint16), transfer)[0].astype(int)


def srgb(light: float) -> float:
    return 255 * (1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("light", [1, 5, 20, 50, 100, 140])
def test_what_is_darker_than_reference_white_looks_as_in_a_standard_video(light):
    assert np.abs(convert("pq", pq_code(light)) - srgb(light / 203)).max() <= 1


@pytest.mark.parametrize("transfer, reference", [("pq", pq_code(203)), ("pq", 0.58), ("hlg", 0.75)])
def test_reference_white_is_nearly_white(transfer, reference):
    """BT.2408: 58 % of PQ and 75 % of HLG."""
    assert np.abs(convert(transfer, reference) - 240).max() <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_grays_stay_gray_and_rise_from_black_to_white(transfer):
    grays = convert(transfer, *np.linspace(0, 1, 200))
    assert np.ptp(grays, axis=1).max() <= 1
    assert np.all(np.diff(grays[:, 0]) >= 0) and grays[0, 0] == 0 and grays[-1, 0] >= 253


def test_levels_are_rounded_not_cut_off():
    lights = np.linspace(20, 140, 200)
    errors = convert("pq", *map(pq_code, lights))[:, 0] - srgb(lights / 203)
    assert abs(errors.mean()) < 0.1 and np.abs(errors).max() < 0.6


def test_highlights_keep_some_detail():
    levels = convert("pq", *map(pq_code, (203, 300, 500, 1000)))[:, 0]
    assert np.all(np.diff(levels) >= 1)


def test_hlg_in_the_middle():
    """A gray of 50 % is scene light 1/12: 1000 * (1/12)^1.2 cd/m²."""
    assert np.abs(convert("hlg", 0.5) - srgb(1000 / 203 * (1 / 12) ** 1.2)).max() <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_colors_of_bt709_come_back(transfer):
    """Red, green and blue of BT.709 at 100 cd/m², as BT.2020 writes them (BT.2087)."""
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    for color in np.eye(3):
        light = 100 * to_2020 @ color
        if transfer == "pq":
            codes = [pq_code(value) for value in light]
        else:  # undo the system gamma, then the camera's curve
            scene = light / 1000 * (light @ [0.2627, 0.6780, 0.0593] / 1000) ** (-0.2 / 1.2)
            codes = [np.sqrt(3 * e) if e <= 1 / 12 else 0.17883277 * np.log(12 * e - 0.28466892) + 0.55991073
                     for e in scene]
        assert np.abs(convert(transfer, codes)[0] - [srgb(100 / 203) if part else 0 for part in color]).max() <= 4
