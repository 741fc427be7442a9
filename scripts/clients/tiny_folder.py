"""Write a folder like a trained model's, with random weights.

python -m scripts.clients.tiny_folder OUT

Every part of the model is in it: windows and full attention, shared key heads, value embeddings, and a vocabulary
that 64 does not divide. All weights are random, also those that training starts at zero, or greedy tokens would say
nothing.
"""

import argparse

import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.conversation import SPECIAL_TOKENS
from nanochat_hf.interop.folder import export
from nanochat_hf.tokenizer import train_tokenizer

VOCABULARY = 500
WINDOW = 32


def tiny_model(seed: int = 0) -> NanochatForCausalLM:
    """A model of four layers, 128 wide, with weights drawn from `seed`."""
    config = NanochatConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,  # heads of 32, the least that vLLM takes
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        window_pattern="SSL",
        max_position_embeddings=512,
        bos_token_id=VOCABULARY - len(SPECIAL_TOKENS),
        eos_token_id=VOCABULARY - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index("<|assistant_end|>"),
        pad_token_id=VOCABULARY - 1,
    )
    model = NanochatForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def main(argv: list[str] | None = None) -> None:
    """Train a tokenizer of 500 tokens on a few sentences, and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder to write")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    words = (
        "".join(chr(97 + i) for i in torch.randint(8, (9000,), generator=generator)) + "the a cat dog river red blue "
    )
    texts = [" ".join(words[i : i + 5] for i in range(start, start + 60, 5)) for start in range(0, len(words), 60)]
    tokenizer = train_tokenizer(texts, VOCABULARY, max_length=512)
    print(export(tiny_model(), tokenizer, args.output))


if __name__ == "__main__":
    main()
