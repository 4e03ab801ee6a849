"""Which layers of a bundle a method explains."""

from __future__ import annotations

from collections.abc import Sequence

from .bundle.manifest import Manifest
from .cams import Method
from .errors import InputError, UnknownLayer, near


def chosen_layers(manifest: Manifest, method: Method, layers: Sequence[str] | str | None) -> tuple[str, ...]:
    """The names of a method's layers. layers: as for `explain`. InputError, UnknownLayer for those that do not fit."""
    known = tuple(t.name for t in manifest.taps)
    if method.layers is None:
        if layers is not None:
            raise InputError(f"{method.name} reads the whole network: leave layers out")
        return ()
    wanted = method.layers if layers is None else layers
    if isinstance(wanted, str) and wanted in ("conv", "last"):
        names = tuple(t.name for t in manifest.taps if wanted in t.roles)
        if not names:
            own = manifest.last_layer
            if wanted == "conv":
                add = "export it with --layers conv"
            elif own is None:
                add = "export it with --layers last, which fails with a reason if the network has no such layer"
            else:
                add = f"export it with layer {own!r} as well"
            raise UnknownLayer(
                f"{method.name} needs the layers {wanted!r}, which this bundle lacks: {add}, or name layers, it "
                f"has {', '.join(known[:5])}"
            )
        return names
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted) if isinstance(wanted, list | tuple) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise UnknownLayer(f"layers {layers!r}: pass names, 'conv' or 'last'; 'camrt info' lists the names")
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in known:
            raise UnknownLayer(f"the bundle has no layer {name!r}{near(name, known)}; 'camrt info' lists them")
    if not names:
        raise UnknownLayer("layers is empty: name layers, or leave the argument out for the method's own")
    for name in names:
        if method.layers == "last" and manifest.tap(name).grid == (1, 1):
            raise UnknownLayer(
                f"layer {name!r} has no grid, it is 1 x 1, so its map would be constant: name another layer"
            )
    return names
