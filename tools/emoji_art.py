"""The emoji that packs are drawn with, and what their licences ask for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe_lvlm.data.scenes import EMOJI, STYLES, Sprites

ATTRIBUTIONS = """\
* Twemoji, copyright Twitter, Inc and other contributors: https://github.com/twitter/twemoji, taken from
  iconify-json/twemoji 1.2.5. Licence: CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
* Noto Emoji, copyright Google: https://github.com/googlefonts/noto-emoji, taken from iconify-json/noto 1.2.9.
  Licence: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0; its text is also moe_lvlm's LICENSE.
* Fluent Emoji (flat), copyright Microsoft Corporation: https://github.com/microsoft/fluentui-emoji, taken from
  iconify-json/fluent-emoji-flat 1.2.6. Licence: MIT, below.
"""
FLUENT_LICENSE = """\
## Fluent Emoji

MIT License. Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def load_sprites(folder: Path) -> Sprites:
    """The pictures of EMOJI in each style. Raises ValueError if a file or a picture is missing."""
    index_path = folder / "emoji_index.json"
    if not index_path.is_file():
        raise ValueError(f"{index_path}: no such file")
    index = json.loads(index_path.read_text(encoding="utf-8"))
    sprites = {}
    for style in STYLES:
        path = folder / f"emoji_{style}_96.npz"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; all of {STYLES} are needed")
        with np.load(path) as archive:
            pictures = dict(zip(archive["keys"].tolist(), archive["img"], strict=True))
        missing = [f"{name} ({key})" for name, key in EMOJI.items() if key not in pictures or key not in index]
        if missing:
            raise ValueError(f"{path}: no picture of {', '.join(missing)}")
        sprites[style] = {name: pictures[key] for name, key in EMOJI.items()}
    return sprites
