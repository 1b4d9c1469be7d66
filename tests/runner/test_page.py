"""The chat page, in a headless Chromium: Debian's package, where it is installed.

    python -m tests.runner.test_page --artifact ARTIFACT --save docs/page.png

has a chat with an artifact on it, and writes the picture that docs/serve.md shows.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.serving import echo_model, running, text_model
from tokenloop.runner import Request, load
from tokenloop.runner.server.app import Settings

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")


class Browser:
    """A page in Chromium, driven by its DevTools protocol over two pipes."""

    def __init__(self, directory):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        # It reads from 3 and writes to 4.
        command = f'exec {CHROMIUM} {flags} "--user-data-dir={directory}" 3<&{to_browser} '
        self._process = subprocess.Popen(
            ["bash", "-c", f"{command} 4>&{from_browser}"], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank", width=800, height=600)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._read, 1 << 20)
                assert piece, "the browser has ended"
                self._rest += piece
            line, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str):
        """The value of an expression, which may be a promise."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script: str):
        """Wait for an expression that is true, and give its value."""
        return self.run(
            f"new Promise(done => {{ const look = () => {{ const found = {script}; "
            "found ? done(found) : setTimeout(look, 20); }; look(); })"
        )

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    found = Browser(tmp_path)
    yield found
    found.close()


def say(browser: Browser, text: str, answers: int) -> None:
    """Say something, and wait until there are so many lines below answers."""
    browser.run(f'document.getElementById("say").value = {json.dumps(text)}')
    browser.run('document.querySelector("form").requestSubmit()')
    browser.until(
        f'document.querySelectorAll(".note, .error").length === {answers} && '
        'document.getElementById("send").textContent === "Send"'
    )


def lines(browser: Browser, kind: str) -> list[str]:
    return browser.run(f'[...document.querySelectorAll(".{kind}")].map(x => x.textContent)')


def test_a_chat_on_the_page_is_answered_with_the_knobs_that_are_set(browser):
    model = text_model(1)

    def alone(prompt):
        return model.generate(Request(model.tokenizer.encode(prompt), 12)).run().text

    first = alone("<system>Be<user>Hello<model>")
    second = alone(f"<system>Be<user>Hello<assistant>{first}<user><b>é</b><model>")
    with running() as found:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{found.port}/")
        browser.until('document.getElementById("model")?.textContent === "toy"')
        for knob, value in (("system", "Be"), ("temperature", "0"), ("max_tokens", "12")):
            browser.run(f'document.getElementById("{knob}").value = "{value}"')
        say(browser, "Hello", 1)
        say(browser, "<b>é</b>", 2)
        assert lines(browser, "user") == ["Hello", "<b>é</b>"]
        assert lines(browser, "assistant") == [first, second]
        assert "12 new (length)" in lines(browser, "note")[0]
        # What is refused is said, and the chat goes on without it.
        browser.run('document.getElementById("top_k").value = "-1"')
        say(browser, "No", 3)
        assert lines(browser, "error") == [
            "top_k is -1; it must be an integer, 0 (off) or more, below 2**63"
        ]
        assert browser.run("messages.length") == 4
        browser.run('document.getElementById("anew").click()')
        assert browser.run("messages.length") == 0 and lines(browser, "assistant") == []


def test_reasoning_is_shown_on_a_line_of_its_own_and_not_sent_back(browser):
    template = (
        "<think></think>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
    )
    model = echo_model(template)
    with running(model) as found:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{found.port}/")
        browser.until('document.getElementById("model")?.textContent === "toy"')
        browser.run('document.getElementById("temperature").value = "0"')
        say(browser, "[[<think>\nHm\n</think>\n\nSure]]", 1)
        say(browser, "[[Yes]]", 2)
        assert lines(browser, "thought") == ["Hm"]
        assert lines(browser, "assistant") == ["Sure", "Yes"]
        assert model.tokenizer.encoded[-1].endswith("<assistant>Sure<user>[[Yes]]<model>")


def take_picture(artifact: Path, path: Path, sayings: list[str]) -> None:
    """Say something to an artifact on the page, and write what it looks like then, as PNG."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running(load(artifact), Settings(artifact.name)) as found,
    ):
        browser = Browser(directory)
        browser.call("Page.navigate", url=f"http://127.0.0.1:{found.port}/")
        browser.until(f'document.getElementById("model")?.textContent === "{artifact.name}"')
        for knob, value in (("temperature", "0"), ("max_tokens", "60")):
            browser.run(f'document.getElementById("{knob}").value = "{value}"')
        for number, text in enumerate(sayings, 1):
            say(browser, text, number)
        assert lines(browser, "error") == []
        browser.run('document.getElementById("say").value = ""')
        path.write_bytes(browser.screenshot())
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a picture of the page in use.")
    parser.add_argument("--artifact", type=Path, required=True, help="one with a chat template")
    parser.add_argument("--save", type=Path, required=True, help="the picture, a PNG")
    options = parser.parse_args()
    if CHROMIUM is None:
        parser.error("no Chromium is installed: apt-get install chromium-headless-shell")
    sayings = ["What is the capital of France?", "And of Italy?"]
    take_picture(options.artifact.resolve(), options.save, sayings)


if __name__ == "__main__":
    main()
