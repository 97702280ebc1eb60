from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from clipsteer import clip as clip_module
from clipsteer.data.dataset import captions_of
from clipsteer.data.files import captions, image_folder
from clipsteer.io.files import (
    FileFormatError,
    read_safetensors,
    read_safetensors_header,
    write_json,
    write_safetensors,
)
from clipsteer.reference import features as reference_features


@pytest.fixture(scope="module")
def clip():
    return clip_module.load()


def table(root, texts):
    root.mkdir(exist_ok=True)
    for i in range(len(texts)):
        Image.new("RGB", (70, 50), (40 * i % 256, (200 - 30 * i) % 256, 90)).save(root / f"{i}.png")
    lines = [f"{i}.png,{text}" for i, text in enumerate(texts)]
    (root / "table.csv").write_text("\n".join(["image,caption", *lines]))
    return captions(root / "table.csv")


TEXTS = ["red", "blue", "red", "a green thing"]


def test_row_i_is_sample_i(clip, tmp_path):
    data = table(tmp_path, TEXTS)
    found = reference_features.compute(clip, data, batch_size=3)
    torch.testing.assert_close(found.image, clip.encode_images([data[i][0] for i in range(4)]).detach())
    with torch.no_grad():
        text = torch.nn.functional.normalize(clip.model.encode_text(clip.tokenizer(TEXTS)), dim=1)
    torch.testing.assert_close(found.text, text)
    assert torch.equal(found.text[0], found.text[2])


def test_a_file_is_computed_once_and_belongs_to_one_model_and_data_set(clip, tmp_path, monkeypatch):
    data, path = table(tmp_path / "a", TEXTS), tmp_path / "ref.safetensors"
    first = reference_features.cached(path, clip, data)
    monkeypatch.setattr(reference_features, "compute", lambda *a, **k: pytest.fail("computed again"))
    again = reference_features.cached(path, clip, data)
    assert torch.equal(again.image, first.image)
    assert torch.equal(again.text, first.text)
    assert again[2:] == first[2:]
    # the same pairs elsewhere are the same data set
    reference_features.read(path, table(tmp_path / "b", TEXTS))
    with pytest.raises(ValueError, match="of 4 other pairs"):
        reference_features.read(path, table(tmp_path / "c", [*TEXTS[:3], "something else"]))
    with pytest.raises(ValueError, match="this data set has 3"):
        reference_features.read(path, table(tmp_path / "d", TEXTS[:3]))
    other = table(tmp_path / "e", TEXTS)
    Image.new("RGB", (70, 50)).save(tmp_path / "e" / "0.png")
    with pytest.raises(ValueError, match="other pairs"):
        reference_features.read(path, other)
    changed = clip_module.load()
    with torch.no_grad():
        changed.model.visual.proj[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        reference_features.cached(path, changed, data)


def test_features_of_another_tool_need_two_tensors(clip, tmp_path):
    data, path = table(tmp_path, TEXTS), tmp_path / "ref.safetensors"
    image, text = torch.randn(2, 4, 6)
    write_safetensors(path, {"image": image, "text": text})
    found = reference_features.read(path, data)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(4))
    # whose they are is not known, so what they are says it
    assert found.digest() == reference_features.read(path, data).digest()
    write_safetensors(path, {"image": image, "text": text.roll(1, 0)})
    assert reference_features.read(path, data).digest() != found.digest()
    for bad in ({"image": image}, {"image": image, "text": text[:, :5]}, {"image": image[0], "text": text[0]}):
        write_safetensors(path, bad)
        with pytest.raises(FileFormatError, match="expected features"):
            reference_features.read(path, data)
    write_safetensors(path, {"image": image * torch.nan, "text": text})
    with pytest.raises(FileFormatError, match="NaN"):
        reference_features.read(path, data)


def test_classes_are_captions(tmp_path):
    for name in ("hot_dog", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    assert captions_of(image_folder(tmp_path)) == ["cat", "hot dog"]


def test_features_of_a_model_with_other_activations_are_refused(tmp_path):
    """The same tensors under another activation function are another model."""
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16}
    small = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    models, data = [], table(tmp_path / "a", TEXTS)
    for name, quick in (("plain", False), ("quick", True)):
        write_json(tmp_path / f"clipsteer-test-{name}.json", {**small, "quick_gelu": quick})
        torch.manual_seed(0)
        models.append(clip_module.load(str(tmp_path / f"clipsteer-test-{name}.json")))
    assert all(torch.equal(a, b) for a, b in zip(*(model.model.state_dict().values() for model in models)))
    reference_features.cached(tmp_path / "features.safetensors", models[0], data)
    with pytest.raises(ValueError, match="activations"):
        reference_features.cached(tmp_path / "features.safetensors", models[1], data)


def test_one_changed_byte_of_kept_features_is_seen(clip, tmp_path):
    data, path = table(tmp_path / "a", TEXTS), tmp_path / "ref.safetensors"
    kept = reference_features.cached(path, clip, data)
    whole, draw = path.read_bytes(), random.Random(0)
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(end), *(draw.randrange(end, len(whole)) for _ in range(200))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ draw.choice([1, 4, 32])]) + whole[at + 1 :])
        try:
            found = reference_features.read(path, data)
        except (FileFormatError, ValueError) as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        # what the header is padded with
        assert at < end
        assert torch.equal(found.image, kept.image)
        assert found[2:] == kept[2:]


def test_features_of_an_older_version_are_taken_with_a_warning(clip, tmp_path, caplog):
    data, path = table(tmp_path / "a", TEXTS), tmp_path / "ref.safetensors"
    first = reference_features.cached(path, clip, data)
    metadata = read_safetensors_header(path).metadata
    older = {name: metadata[name] for name in ("kind", "model", "data", "weights")}
    write_safetensors(path, read_safetensors(path), older)
    again = reference_features.cached(path, clip, data)
    assert torch.equal(again.image, first.image)
    assert "a version that kept no checksum" in caplog.text
    write_safetensors(path, read_safetensors(path), {**older, "identity": metadata["identity"]})
    with pytest.raises(FileFormatError, match="lacks its checksum"):
        reference_features.read(path, data)


def test_any_of_many_images_that_is_another_is_seen(clip, tmp_path):
    """Not only those of a sample."""
    texts = [f"thing {i}" for i in range(40)]
    data, path = table(tmp_path / "a", texts), tmp_path / "ref.safetensors"
    reference_features.cached(path, clip, data)
    reference_features.read(path, table(tmp_path / "b", texts))
    seen = np.linspace(0, 39, 16).round().astype(int)
    row = next(i for i in range(40) if i not in seen)
    Image.new("RGB", (70, 50), (1, 2, 3)).save(tmp_path / "b" / f"{row}.png")
    with pytest.raises(ValueError, match="other pairs"):
        reference_features.read(path, captions(tmp_path / "b" / "table.csv"))
