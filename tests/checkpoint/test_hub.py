"""Names, paths and hub ids."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from mimo_jax import checkpoint
from mimo_jax.checkpoint import hub


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model called mimo-tiny, and an asset that is no model."""
    for name in ("mimo-tiny", "not-a-model"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    (tmp_path / "assets" / "mimo-tiny" / "config.json").write_text("{}")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "MiMo-V2.5-Pro.json").write_text("{}")
    monkeypatch.setattr(hub.resources, "files", lambda _: tmp_path)
    return tmp_path / "assets"


def test_bundled_name(assets: Path) -> None:
    assert checkpoint.bundled() == {"mimo-tiny": assets / "mimo-tiny"}
    assert checkpoint.resolve("mimo-tiny") == assets / "mimo-tiny"


def test_folder(tmp_path: Path) -> None:
    assert checkpoint.resolve(tmp_path) == tmp_path
    assert checkpoint.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["MiMo-Tiny", "mimo_tiny", "mimotiny"])
def test_mistyped_name(name: str, assets: Path) -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match=r"did you mean 'mimo-tiny'"):
        checkpoint.resolve(name)


def test_preset_has_no_weights(assets: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"without weights.*XiaomiMiMo/MiMo-V2\.5-Pro"):
        checkpoint.resolve("MiMo-V2.5-Pro")


@pytest.mark.parametrize("name", ["./models/mimo", "/nowhere/mimo", "a/b/c", "~/none/mimo"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match="does not exist"):
        checkpoint.resolve(name)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(checkpoint.ModelNotFoundError, match="is a file; give the folder"):
        checkpoint.resolve(tmp_path / "config.json")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.resolve("XiaomiMiMo/MiMo-V2.5") == tmp_path
    ((name, options),) = calls
    assert name == "XiaomiMiMo/MiMo-V2.5"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(p.endswith(".py") for p in options["allow_patterns"])


def fail(error: Exception, monkeypatch: pytest.MonkeyPatch) -> str:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(checkpoint.ModelNotFoundError) as caught:
        checkpoint.resolve("someone/some-model")
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_hub_without_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, told to stay offline: no request is made."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(checkpoint.ModelNotFoundError, match="hub could not be reached"):
        checkpoint.resolve("someone/some-model")


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = without_response(errors.RepositoryNotFoundError, "404")
    assert "no model of that name on the hub" in fail(missing, monkeypatch)
    gated = without_response(errors.GatedRepoError, "403")
    assert "ask for access" in fail(gated, monkeypatch)
    broken = without_response(errors.HfHubHTTPError, "500\nmore")
    assert "HfHubHTTPError: 500); check the connection" in fail(broken, monkeypatch)


def without_response(kind: type[Exception], text: str) -> Exception:
    """An error of the hub as it is raised, but that no server was asked."""
    error = kind.__new__(kind, text)
    error.args = (text,)
    return error


@pytest.mark.parametrize("name", ["~nobody-here/mimo", "a" * 5000, f"a/{'b' * 5000}/c", "a\0b"])
def test_names_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(checkpoint.ModelNotFoundError):
        checkpoint.resolve(name)


def test_an_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match="the model's name is empty"):
        checkpoint.resolve("")
