"""Which SAE is in a place: what is there decides, and what is missing is said of every format."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests._golden import GOLDEN, folders, run_golden

from clipsteer import SAE, FileFormatError
from clipsteer.io.files import write_safetensors
from clipsteer.sae import formats as sae_io

LOOKED_FOR = """no SAE in here; looked for the files of
  clipsteer: no cfg.json
  SAELens: no cfg.json
  sparsify: no cfg.json
  dictionary_learning: no ae.pt
  saev: no *.pt
  ViSAEBench: no sae.pt
  overcomplete: no *.pt
  ViT-Prisma: no *.pt"""


def test_a_folder_that_is_none_names_every_format_and_what_was_missing(tmp_path):
    with pytest.raises(FileFormatError) as caught:
        SAE.from_pretrained(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {LOOKED_FOR}"


def test_a_checkpoint_of_another_model_is_not_taken_for_one_of_prisma(tmp_path):
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(FileFormatError) as caught:
        SAE.from_pretrained(tmp_path)
    said = dict(line.strip().split(": ") for line in str(caught.value).splitlines()[1:])
    assert said["ViT-Prisma"] == "resnet.pt has no W_enc and no W_dec"
    assert said["overcomplete"] == "resnet.pt has no dictionary._weights"
    assert said["saev"] == "resnet.pt does not begin with a line of JSON"
    assert said["ViSAEBench"] == "no config.json"
    assert said["dictionary_learning"] == 'no config.json with a block "trainer" that names its dict_class'
    torch.save({"W_enc": torch.ones(3, 4), "W_dec": torch.ones(4, 3)}, tmp_path / "resnet.pt")
    with pytest.raises(FileFormatError, match=r"ViT-Prisma: no configuration inside, and no config.json beside it"):
        SAE.from_pretrained(tmp_path / "resnet.pt")
    torch.save([1, 2], tmp_path / "resnet.pt")
    with pytest.raises(FileFormatError, match="no SAE in here"):
        SAE.from_pretrained(tmp_path)


def test_a_configuration_in_yaml_is_named(tmp_path):
    shutil.copy(GOLDEN / "visaebench-topk" / "sae.pt", tmp_path)
    (tmp_path / "config.yaml").write_text("k: 4\n")
    with pytest.raises(FileFormatError, match=r"ViSAEBench: config.yaml is not read; write it as config.json"):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [*folders(cfg=True), *folders(cfg=False)])
def test_files_and_folders_are_told_apart_whatever_they_are_called(name, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "x"))
    library = name.split("-")[0]
    assert sae_io.detect(folder) == library
    file = next((folder / n for n in ("ae.pt", "sae.pt") if (folder / n).is_file()), None)
    if file is not None:
        renamed = file.rename(folder / "something.pt")
        assert sae_io.detect(folder) == sae_io.detect(renamed) == library


def test_a_folder_of_hook_points_names_those_with_an_sae(tmp_path):
    shutil.copytree(GOLDEN / "sparsify-topk", tmp_path / "layers.3")
    shutil.copytree(GOLDEN / "dictionary_learning-topk", tmp_path / "run" / "trainer_0")
    shutil.copytree(GOLDEN / "saev-relu", tmp_path / "layers.11")
    torch.save({}, tmp_path / "n_images_5.pt")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "config.json").write_text("{}")
    with pytest.raises(FileFormatError) as caught:
        SAE.from_pretrained(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no SAE itself, but folders with one: layers.11, layers.3, run/trainer_0"
    for name in ("layers.11", "layers.3", "run/trainer_0"):
        assert SAE.from_pretrained(tmp_path / name).d_in == 6


def test_too_many_folders_are_not_walked(tmp_path):
    for number in range(1100):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(FileFormatError, match="no SAE in here"):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["saelens-topk", "sparsify-topk"])
def test_a_config_that_would_have_no_effect_is_refused(name):
    with pytest.raises(ValueError, match=r"whose files say all; leave out config=\{'k': 5\}"):
        SAE.from_pretrained(GOLDEN / name, config={"k": 5})


def test_weights_of_visaebench_in_safetensors(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "visaebench-topk", tmp_path / "x"))
    write_safetensors(folder / "model.safetensors", torch.load(folder / "sae.pt", weights_only=True))
    (folder / "sae.pt").unlink()
    run_golden(folder)


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with two SAEs in folders and a file of its own."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    repo = tmp_path / "repo"
    shutil.copytree(GOLDEN / "visaebench-batchtopk", repo / "batchtopk_16x_k128")
    shutil.copytree(GOLDEN / "sparsify-topk", repo / "layers.3")
    shutil.copy(GOLDEN / "saev-relu" / "sae.pt", repo / "vit.pt")
    listing = [str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()]
    asked = []

    def snapshot_download(name, *, allow_patterns):
        chosen = sorted(huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=allow_patterns))
        asked.append(chosen)
        target = tmp_path / "cache" / str(len(asked))
        target.mkdir(parents=True)
        for file in chosen:
            (target / file).parent.mkdir(exist_ok=True)
            shutil.copy(repo / file, target / file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = [SimpleNamespace(rfilename=name) for name in listing]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: SimpleNamespace(siblings=files))
    return asked


def test_a_folder_and_a_file_of_a_repository(hub):
    assert SAE.from_pretrained("hf-hub:org/repo/batchtopk_16x_k128").architecture == "batch_topk"
    assert hub[-1] == ["batchtopk_16x_k128/config.json", "batchtopk_16x_k128/sae.pt"]
    assert SAE.from_pretrained("hf-hub:org/repo/vit.pt").architecture == "relu"
    assert hub[-1] == ["vit.pt"]


@pytest.mark.parametrize("path", ["hf-hub:org/repo", "hf-hub:org/repo/layers.4"])
def test_a_repository_names_its_folders_with_an_sae(hub, path):
    with pytest.raises((FileFormatError, FileNotFoundError)) as caught:
        SAE.from_pretrained(path)
    assert str(caught.value).endswith("in hf-hub:org/repo/batchtopk_16x_k128, hf-hub:org/repo/layers.3")


def test_a_hub_that_does_not_list_hides_no_error(hub, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    with pytest.raises(FileFormatError, match=r"no SAE in here(.|\n)*ViT-Prisma: no \*.pt$"):
        SAE.from_pretrained("hf-hub:org/repo")
