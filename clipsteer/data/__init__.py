"""Images with names: the bundled EmojiStyles, image folders, caption tables and WebDataset
shards; ``open_dataset`` opens each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.data.dataset import ImageDataset as ImageDataset
    from clipsteer.data.dataset import captions_of as captions_of
    from clipsteer.data.dataset import data_digest as data_digest
    from clipsteer.data.dataset import labelled as labelled
    from clipsteer.data.dataset import renamed as renamed
    from clipsteer.data.dataset import sample_names as sample_names
    from clipsteer.data.dataset import spread as spread
    from clipsteer.data.dataset import told_apart as told_apart
    from clipsteer.data.emoji import HELD_OUT_STYLE as HELD_OUT_STYLE
    from clipsteer.data.emoji import TRAINED_STYLES as TRAINED_STYLES
    from clipsteer.data.emoji import Concept as Concept
    from clipsteer.data.emoji import EmojiStyles as EmojiStyles
    from clipsteer.data.emoji import Split as Split
    from clipsteer.data.emoji import classify30 as classify30
    from clipsteer.data.emoji import split as split
    from clipsteer.data.emoji import stratified as stratified
    from clipsteer.data.files import class_folder as class_folder
    from clipsteer.data.files import image_folder as image_folder
    from clipsteer.data.files import is_emoji as is_emoji
    from clipsteer.data.files import open_dataset as open_dataset
    from clipsteer.data.identity import Identity as Identity
    from clipsteer.data.identity import identity_of as identity_of
    from clipsteer.data.readable import unreadable as unreadable
    from clipsteer.data.readable import without_unreadable as without_unreadable
    from clipsteer.data.tables import captions as captions
    from clipsteer.data.webdataset import shards as shards
    from clipsteer.io.images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
    from clipsteer.io.images import MAX_PIXELS as MAX_PIXELS
    from clipsteer.io.images import read_image as read_image

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
