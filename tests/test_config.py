"""What a user caused ends in one line that says how to go on."""

import pytest
import torch

from nanochat_hf.config import user_errors


def raising(error):
    @user_errors
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a\nb"), "error: a b"),
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has"), "error: CUDA out of memory: it does not fit; lower --device-batch-size"),
    ],
)  # fmt: skip
def test_one_line_and_exit_code_2(error, said, capsys):
    with pytest.raises(SystemExit) as caught:
        raising(error)()
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith(said) and printed.count("\n") == 1


def test_a_host_without_room_says_so_too(capsys):
    @user_errors
    def main():
        torch.empty(10**17)

    with pytest.raises(SystemExit):
        main()
    assert "--gradient-checkpointing true" in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        raising(RuntimeError("a bug"))()
