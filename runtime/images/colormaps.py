"""Colour maps by name: what colour a map's value in [0, 1] has."""

from __future__ import annotations

import functools

import numpy as np

from ..errors import UnknownName, near

# 52 colours each, RGB in hexadecimal, evenly spaced over [0, 1] and interpolated between. viridis and inferno:
# Smith and van der Walt, 2015 (CC0); turbo: Mikhailov, 2019 (Apache-2.0); values as matplotlib 3 draws them.
_COLOURS = {
    "viridis": (
        "44015446085c471063481769481d6f482475472a7a46307e453781433d844142873f48893d4e8a3a538b38598c355e8d33638d"
        "31688e2e6d8e2c718e2a768e297b8e27808e25848e23898e218e8d20928c1f978b1e9c891fa18821a58524aa8328ae802eb37c"
        "35b7793dbc7446c06f50c46a5ac86465cb5e70cf577cd25089d54895d840a2da37b0dd2fbddf26cae11fd8e219e5e419f1e51d"
        "fde725"
    ),
    "inferno": (
        "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c59106e61136e69166e71196e"
        "781c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557bf3952c63d4dcc4248d34743d94d3ddf5337e45a31e9612b"
        "ed6925f1711ff47918f78212f98b0bfa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156f2ea69f2f27df5f992"
        "fcffa4"
    ),
    "turbo": (
        "30123b36215f3b2f803f3e9c424bb54559cb4666dd4773eb4680f6458cfd4099ff38a5fb2fb2f427bee91fc9dd1ad4d018ddc2"
        "1ae4b622ebaa2ff19b3ff68a52fa7a65fd6979fe598bff4b9cfe40a9fb39b7f735c3f134d0ea34dbe236e5d938eecf3af5c53a"
        "faba39fdae35fea130fe932afc8423f9751df46617ef5811e84b0ce14109d83706ce2d04c32503b71d02a916019b0f018b0902"
        "7a0403"
    ),
}
# The colour map that the CAM literature draws with: (position, red, green, blue).
_JET = np.array(
    [[0, 0, 0, 0.5], [0.125, 0, 0, 1], [0.375, 0, 1, 1], [0.625, 1, 1, 0], [0.875, 1, 0, 0], [1, 0.5, 0, 0]]
)
COLORMAPS = (*_COLOURS, "jet")
_LEVELS = 256


def colorize(scaled: np.ndarray, colormap: str = "turbo") -> np.ndarray:
    """A map in [0, 1], (H, W) -> uint8 (H, W, 3), in 256 levels. UnknownName for a colour map that does not exist."""
    levels = (np.clip(scaled, 0, 1) * (_LEVELS - 1) + 0.5).astype(np.uint8)
    return _table(colormap)[levels]


@functools.cache
def _table(colormap: str) -> np.ndarray:
    """(256, 3) uint8."""
    if colormap not in COLORMAPS:
        raise UnknownName(f"no colour map {colormap!r}{near(str(colormap), COLORMAPS)}")
    if colormap == "jet":
        at, colours = _JET[:, 0], _JET[:, 1:] * 255
    else:
        colours = np.frombuffer(bytes.fromhex(_COLOURS[colormap]), np.uint8).reshape(-1, 3)
        at = np.linspace(0, 1, len(colours))
    levels = np.linspace(0, 1, _LEVELS)
    return np.stack([np.interp(levels, at, colours[:, i]).round() for i in range(3)], axis=1).astype(np.uint8)
