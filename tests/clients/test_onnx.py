"""The model through torch.onnx, whose file ONNX Runtime computes alike."""

import pytest
import torch

from scripts.clients.tiny_folder import VOCABULARY, WINDOW, tiny_model

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")


class Logits(torch.nn.Module):
    """Ids (B, T) → logits (B, T, V), without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def test_onnx_runtime_gives_the_same_logits_for_other_lengths_too(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    module = Logits(tiny_model()).eval()
    rows, positions = torch.export.Dim("rows", min=1, max=8), torch.export.Dim("positions", min=2, max=512)
    program = torch.onnx.export(
        module,
        (torch.randint(VOCABULARY, (2, 2 * WINDOW)),),
        dynamo=True,
        dynamic_shapes=({0: rows, 1: positions},),
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for shape in ((1, 7), (3, 3 * WINDOW)):  # within the window, and past it
        ids = torch.randint(VOCABULARY, shape)
        with torch.no_grad():
            expected = module(ids)
        (got,) = session.run(None, {name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-5)
