"""Tokens and keys reach no file, no log, no message."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.secrets import hide, kind_of_secret
from helpers import tiny_run_config

TOKEN = "hf_notToBeSeenAnywhere0123456789"
KEY = "sk-not-to-be-seen-anywhere-0123456789"
PASSWORD = "not-to-be-seen-password"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"https://me:{PASSWORD}@host/v1", "https://***@host/v1"),
        (f"a https://{PASSWORD}@host b ftp://x:y@z", "a https://***@host b ftp://***@z"),
        (f"token {TOKEN}.", "token ***."),
        (f"key '{KEY}'", "key '***'"),
        (f"{{'Authorization': 'Bearer {PASSWORD}'}}", "{'Authorization': 'Bearer ***'}"),
    ],
)
def test_shapes(text, hidden):
    assert hide(text) == hidden
    assert kind_of_secret(text)
    assert kind_of_secret(hidden) in (None, "a name or a password in an address")


@pytest.mark.parametrize(
    "text", ["", "https://host/a@b", "hf_short", "ask-me", "me@host", "sk-1", "a bearer of news", "anthropic:phil@my/folder"]
)
def test_ordinary_texts_stay(text):
    assert hide(text) == text
    assert kind_of_secret(text) is None


def test_values_of_variables(monkeypatch):
    for name in ("HF_TOKEN", "MY_API_KEY", "DB_PASSWORD", "AWS_SECRET"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "plain-words-here")
            assert hide("so plain-words-here!") == "so ***!"
            assert kind_of_secret("so plain-words-here!") == "the value of a secret environment variable"
    monkeypatch.setenv("HF_TOKEN", "a")
    monkeypatch.setenv("HOME_FOLDER", "plain-words-here")
    assert hide("a plain-words-here") == "a plain-words-here"


def test_messages_are_without():
    assert str(UserError(f"model https://me:{PASSWORD}@host: no")) == "model https://***@host: no"


@pytest.mark.parametrize("typed", [f"https://me:{PASSWORD}@host/model", TOKEN, f"--model={KEY}"])
def test_typed_secrets_are_refused(typed, tmp_path, capfd):
    assert main(["evaluate", "--out", str(tmp_path / "out"), "--model", typed]) == 2
    said = "".join(capfd.readouterr())
    assert "give it in an environment variable instead" in said
    assert not any(secret in said for secret in (PASSWORD, TOKEN, KEY))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["run"], ["evaluate"], ["compare"]])
@pytest.mark.parametrize("line", [f"text: https://me:{PASSWORD}@host/x", f"# {TOKEN}", f"out: {KEY}"])
def test_configurations_with_secrets_are_refused(command, line, tmp_path, capfd):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: x\nlayers: [1]\n{line}\n")
    assert main([*command, "--config", str(path)]) == 2
    said = "".join(capfd.readouterr())
    assert "environment variable" in said
    assert not any(secret in said for secret in (PASSWORD, TOKEN, KEY))
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_logs_and_tracebacks_are_without(monkeypatch, capfd, tmp_path):
    def command(arguments):
        logging.getLogger("bad_neurons.x").warning("at https://me:%s@host", PASSWORD)
        raise ZeroDivisionError(f"{TOKEN} and {KEY}")

    monkeypatch.setattr("bad_neurons.stages.report_command", command)
    with pytest.raises(SystemExit):
        main(["report"])
    said = "".join(capfd.readouterr())
    assert "https://***@host" in said
    assert "ZeroDivisionError: *** and ***" in said
    assert not any(secret in said for secret in (PASSWORD, TOKEN, KEY))


def test_a_whole_run_writes_none(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("WANDB_API_KEY", "an-ordinary-looking-secret")
    assert main(["run", "--config", str(tiny_run_config(tmp_path))]) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"results.json", "report.html", "delta.safetensors", "last.ckpt"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in (TOKEN, KEY, "an-ordinary-looking-secret")), path
    assert not any(secret in "".join(capfd.readouterr()) for secret in (TOKEN, KEY, "an-ordinary-looking-secret"))


def test_a_process_of_its_own():
    code = "from bad_neurons.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "--run", f"https://me:{PASSWORD}@host"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, PASSWORD in done.stderr + done.stdout) == (2, False)
