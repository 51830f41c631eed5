"""A folder, put online: a repository on the Hugging Face Hub, made and filled by huggingface_hub."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from support.cli import RunError, UsageError, first_line, is_out_of_memory


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    push = "then send the folder to this place on the Hugging Face Hub, as whom `hf auth login` or HF_TOKEN says"
    parser.add_argument("--push_to_hub", metavar="USER/NAME", default="", help=push)
    parser.add_argument("--private", action="store_true", help="the place on the Hub is for you alone")


def hub_problems(name: str, private: bool) -> list[str]:
    """What can be known to be wrong with the two flags before anything is written. Asks nobody."""
    if not name:
        return ["--private is of --push_to_hub USER/NAME: give both"] if private else []
    problems = []
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it has no slash")
    except HFValidationError as e:
        problems.append(f"--push_to_hub {name} can't be a place on the Hub ({first_line(e)}): write it as USER/NAME")
    if not huggingface_hub.get_token():
        problems.append("--push_to_hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    return problems


def push_folder(folder: Path, name: str, kind: str, private: bool, replace: bool = False) -> None:
    """Makes a place `name` for a "model" or a "space", and sends the folder there. With `replace` the place may be
    there already: its files stay in its history. Raises UsageError where that isn't so, RunError where the Hub or the
    network refuses; the folder stays."""
    command = ["hf", "upload", name, str(folder), "--repo-type", kind]
    if private:
        command.append("--private")
    again = f"{folder} stays here: `{shlex.join(command)}` sends it"
    print(f"Sending {folder} to {name} ...", flush=True)
    with hub_faults(name, again):
        api = huggingface_hub.HfApi()
        sdk = "gradio" if kind == "space" else None
        # without --private it is as the account's settings say
        url = api.create_repo(name, repo_type=kind, private=private or None, exist_ok=replace, space_sdk=sdk)
        if private and not api.repo_info(name, repo_type=kind).private:
            raise UsageError(f"{name} is there already, for all to see: choose another name, or leave --private out")
        api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message="Trained by train.py")
    print(f"Sent: {url}", flush=True)


@contextlib.contextmanager
def hub_faults(name: str, again: str):
    """Makes a fault of huggingface_hub, or of what it stands on, one sentence that ends with what to do."""
    try:
        yield
    except UsageError:
        raise
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status == 409:
            raise UsageError(f"{name} is there already: choose another name; or, to replace it, {again}") from None
        if status in (401, 403):
            remedy = "make one that may write there, at huggingface.co/settings/tokens"
            raise RunError(f"the Hub refuses the token ({said(e)}): {remedy}; {again}") from None
        raise RunError(f"the Hub answers {status} ({said(e)}): {again} when that is put right") from None
    except Exception as e:  # each release has another client for HTTP, with errors of its own
        if is_out_of_memory(e):
            raise
        raise RunError(f"the Hub can't be reached ({type(e).__name__}): check the network; {again}") from None


def said(e: HfHubHTTPError) -> str:
    """The Hub's own words, in one line."""
    return (e.server_message or str(e)).strip().splitlines()[0]
