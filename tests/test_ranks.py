"""What only a second rank or a GPU shows: which devices the ranks can talk by, and who waits for whom."""
import importlib
import json

import pytest
import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from support.pairs import prepare_pairs
from support.toy import prepare_toy
from test_copies import SCRIPTS
from test_training import ROOT, TORCHRUN, finish, start

NAMES = [script.stem for script in SCRIPTS]
of_scripts = pytest.mark.parametrize("name", NAMES)


class Asked(Exception):
    """What a process group was asked for."""


def backends_by_device(name, backend):
    """{device type: backend} of a process group that was asked for by `backend`, on a machine with `name` GPUs."""
    accelerator = torch.device(name) if name else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda *args, **options: accelerator)
        patch.setattr(torch._C, "_get_accelerator", lambda *args: accelerator or torch.device("cpu"))  # torch 2.6
        return BackendConfig(dist.Backend(backend or "undefined")).get_device_backend_map()


@of_scripts
@pytest.mark.parametrize("device", ["cuda", ""])
def test_the_ranks_of_every_script_can_talk_by_cpu_and_gpu(name, device, tmp_path, monkeypatch):
    def ask(backend=None, **options):
        raise Asked(backend)

    for variable, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0).items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(dist, "init_process_group", ask)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(Asked) as asked:
        importlib.import_module(name).main(["--out", str(tmp_path / "out")])
    served = backends_by_device(device, *asked.value.args)
    assert served["cpu"] == "gloo"  # the stop signal, barriers and objects
    assert device == "" or served["cuda"] == "nccl"


def test_a_group_without_a_name_serves_the_gpu_alone():
    """The fault that the test above is for: if PyTorch mends it, this one says so."""
    assert "cpu" not in backends_by_device("cuda", None)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with small versions of both toys, where `python SCRIPT` would put them."""
    home = tmp_path_factory.mktemp("ranks")
    prepare_toy(home / "data/toy", count=480, val_count=300, steps=3, judge_steps=3)
    prepare_pairs(home / "data/pairs", count=480, steps=3)
    return home


@pytest.fixture(scope="module")
def ends(toys):
    """How `torchrun --nproc_per_node=2 SCRIPT --max-train-steps 4` ends, on each rank: {script: None, if all is well}.

    One start of torchrun serves all scripts; rank 0 writes every checkpoint late.
    """
    jobs = {name: ["--max-train-steps", "4"] for name in NAMES}
    jobs["erw"] += ["--warmup-steps", "2"]  # phase I cannot be sampled
    (toys / "jobs.json").write_text(json.dumps(jobs))
    code, stdout, stderr = finish(start([*TORCHRUN, ROOT / "tests/whole_toy.py", "jobs.json"], cwd=toys))
    assert code == 0, stdout[-2000:] + stderr[-2000:]
    return json.loads((toys / "ends.json").read_text())


@of_scripts
def test_the_whole_toy_on_two_ranks_with_a_late_rank_0(name, toys, ends):
    assert [of_rank[name] for of_rank in ends] == [None, None]
    log = (toys / f"runs/{name}-toy/log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 4
