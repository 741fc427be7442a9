"""A server on loopback, and a model that says what a test wants."""

import contextlib
import threading
import time

import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.generation import Continuous
from nanochat_hf.serving import Scheduler, Served
from nanochat_hf.tokenizer import train_tokenizer

from .generating import shaken

TEXT = ["The cat sat on the mat and counted 12 letters: naïve café 🙂 3*4"] * 3
NAME = "tiny"


def small_engine(rows=4, positions=400):
    """Continuous on a tiny model with random weights."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=positions)
    model = shaken(lambda: NanochatForCausalLM(NanochatConfig(vocab_size=280, **sizes)))
    return Continuous(model, train_tokenizer(TEXT, 280), rows=rows)


def ids_of(tokenizer, pieces):
    """Strings of special tokens and texts → ids."""
    found = []
    for piece in pieces:
        special = piece.startswith("<|")
        found += (
            [tokenizer.convert_tokens_to_ids(piece)]
            if special
            else tokenizer(piece, add_special_tokens=False)["input_ids"]
        )
    return found


class Script:
    """Makes the engine's model say the ids of `pieces`, whatever it is asked; one request at a time."""

    def __init__(self, engine, monkeypatch):
        self.engine, self.said, self.begin, self.prompts = engine, [], 0, []
        forward, submit = engine.model.forward, engine.submit

        def scripted(**kwargs):
            output = forward(**kwargs)
            if kwargs["input_ids"].shape[1] == 1 and self.said:
                output.logits = torch.full_like(output.logits, -10)
                for row, at in enumerate(kwargs["position_ids"][:, 0].tolist()):
                    place = min(max(at - self.begin, 0), len(self.said) - 1)
                    output.logits[row, -1, self.said[place]] = 10
            return output

        def submitted(request):
            self.begin = len(request.prompt) - 1
            self.prompts.append(list(request.prompt))
            return submit(request)

        monkeypatch.setattr(engine.model, "forward", scripted)
        monkeypatch.setattr(engine, "submit", submitted)

    def say(self, *pieces):
        """From now on."""
        self.said = ids_of(self.engine.tokenizer, pieces)


@contextlib.contextmanager
def running(engine, *, name=NAME, key=None, waiting=64, settings=None):
    """(address, Site) of a server of `engine`."""
    import uvicorn

    from nanochat_hf.serving.app import Site, build_app

    site = Site(Served(name, engine), Scheduler(engine, waiting), key, settings)
    server = uvicorn.Server(uvicorn.Config(build_app(site), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", site
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition, seconds=20):
    """Wait until condition(); False after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
