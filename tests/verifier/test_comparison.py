import pytest
import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.verifier import comparison
from gemma4_moe.verifier.comparison import compare_all
from gemma4_moe.verifier.verify import verify
from support.checkpoints import config_of, write_checkpoint
from support.formulas import nemo_from_hf
from support.memory import memory_below
from support.models import random_hf_state_dict
from support.verification import both_layouts, checked


def test_progress_counts_the_targets_bytes(tmp_path):
    hf, nemo, back = both_layouts()
    calls = []
    checked(tmp_path, nemo, back, hf=hf, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in hf.values())
    assert calls[-1] == (total, total)
    assert {whole for _, whole in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("all_differ", [False, True])
def test_memory_stays_within_the_budget_whatever_differs(tmp_path, monkeypatch, all_differ):
    hf = random_hf_state_dict(layers=1, E=30, H=500, I=330, dtype=torch.float32)
    hf["model.language_model.embed_tokens.weight"] = torch.rand(12_000, 500)
    nemo = nemo_from_hf(hf, torch.float32)
    if all_differ:
        nemo = {name: tensor + 1 for name, tensor in nemo.items()}
    write_checkpoint(tmp_path / "hf", hf)
    write_checkpoint(tmp_path / "nemo", nemo, config_of(hf))
    largest = max(tensor.nbytes for tensor in nemo.values())
    budget = 12 * 2**20
    assert largest > 3 * budget
    del hf, nemo

    def measured(*args):
        with memory_below(budget, above=2**20):
            return compare_all(*args)

    monkeypatch.setattr(comparison, "compare_all", measured)
    result = verify(tmp_path / "hf", tmp_path / "nemo", max_memory=budget)
    assert (result.equal == 0) is all_differ


def test_a_budget_below_one_expert_is_refused(tmp_path):
    hf, nemo, _ = both_layouts()
    with pytest.raises(UsageError, match="smaller than one expert") as caught:
        checked(tmp_path, hf, nemo, max_memory=1000)
    least = int(caught.value.facts["expected"].split()[2])
    assert verify(tmp_path / "source", tmp_path / "target", max_memory=least).different == ()
