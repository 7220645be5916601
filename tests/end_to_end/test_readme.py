"""Every command of the README, run in a fresh copy of the repository as the reader would run it.

A training command is run verbatim with a few keys appended that make it small; the rest as it stands.
"""

import concurrent.futures
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.commands import covered, fragments_run
from tests.end_to_end.conftest import REPOSITORY, Finished, environment_of_commands, free_port, run_command

pytestmark = pytest.mark.end_to_end

SMALL = [
    "model.hidden_size=32",
    "model.sequence_length=32",
    "moe.expert_hidden_size=32",
    "train.steps=2",
    "train.validation_samples=8",
    "monitor.sample_tokens=0",
]


def readme_commands() -> list[str]:
    """The command lines of the README's ``bash`` blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


COMMANDS = readme_commands()
SLURM = "sbatch launch/slurm.sbatch run.name=cluster"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository's files, without environments, data and runs, and prepared quickstart data."""
    root = tmp_path_factory.mktemp("readme") / "adamoe_dist"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "data", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, root, ignore=ignored)
    shutil.copytree(REPOSITORY / "adamoe_dist" / "data", root / "adamoe_dist" / "data", dirs_exist_ok=True)
    texts = root / "my_text"
    texts.mkdir()
    for path in sorted((root / "adamoe_dist").rglob("*.py")):
        shutil.copy(path, texts / f"{path.parent.name}_{path.name}")
    (root / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    return root


def run(command: str, checkout: Path, small: bool = True, timeout_s: float = 400) -> Finished:
    full = f"{command} {' '.join(SMALL)}" if small else command
    environment = {"PYTHONPATH": str(checkout), "MASTER_PORT": str(free_port())}
    done = run_command(["bash", "-c", full], checkout, timeout_s, environment)
    assert done.returncode == 0, f"{full}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def with_port(command: str) -> str:
    """Give a launcher a free port, so that runs on one machine do not meet."""
    port = free_port()
    command = re.sub(r"^deepspeed ", f"deepspeed --master_port {port} ", command)
    return re.sub(r"^torchrun ", f"torchrun --master-port {port} ", command)


def only(fragment: str) -> str:
    """The one README command that contains ``fragment``."""
    (command,) = [command for command in COMMANDS if fragment in command]
    return command


@pytest.mark.parametrize("fragment", [covered("--dry-run"), covered("--print-config")])
def test_looking_before_training(checkout, fragment: str) -> None:
    assert run(only(fragment), checkout, small=False).stdout


def test_default_command_prepares_its_data_and_trains(checkout) -> None:
    """``deepspeed launch/pretrain.py`` with no further word."""
    done = run(with_port("deepspeed launch/pretrain.py"), checkout)
    assert "is missing: training it on ['python:stdlib']" in done.stdout
    assert "step 2/2" in done.stdout


@pytest.mark.parametrize(
    "fragment",
    [
        covered("configs/quickstart.yaml run.name=full"),
        covered("run.name=one"),
        pytest.param(covered("parallel.expert=8"), marks=pytest.mark.slow),
        pytest.param(covered("parallel.expert=2"), marks=pytest.mark.slow),
        covered("run.name=top2"),
        pytest.param(covered("run.name=held"), marks=pytest.mark.slow),
        covered("run.name=cut"),
    ],
)
def test_training_commands(checkout, fragment: str) -> None:
    done = run(with_port(only(fragment)), checkout)
    assert "step 2/2" in done.stdout


def test_resume_command(checkout) -> None:
    """Continues the run named ``full`` of the test before."""
    if not (checkout / "runs" / "full" / "checkpoints").exists():
        run(with_port(only("configs/quickstart.yaml run.name=full")), checkout)
    command = f"{with_port(only(covered('checkpoint.resume=auto')))} {' '.join(SMALL)} train.steps=3"
    done = run(command, checkout, small=False)
    assert "continuing from" in done.stdout and "step 3/3" in done.stdout


def test_own_text_commands(checkout) -> None:
    run(only(covered("tools/train_tokenizer.py")).replace("8000", "600"), checkout, small=False)
    run(only(covered("tools/prepare_data.py")), checkout, small=False)
    done = run(with_port(only(covered("configs/own_text.yaml"))), checkout)
    assert "step 2/2" in done.stdout


def test_commands_from_and_to_hugging_face(checkout) -> None:
    """A run goes out and is used; a model comes in, gets null experts and is fine-tuned."""
    if not (checkout / "runs" / "full" / "checkpoints").exists():
        run(with_port(only("configs/quickstart.yaml run.name=full")), checkout)
    assert "AdaMoEForCausalLM" in run(only(covered("export --from runs/full")), checkout, small=False).stdout
    assert run(only(covered("tools/generate.py")), checkout, small=False).stdout.strip()
    assert "bits a byte" in run(only(covered("tools/evaluate.py")), checkout, small=False).stdout
    write_mixtral(checkout / "my_model", (checkout / "README.md").read_text())
    (checkout / "examples.jsonl").write_text('{"prompt": "Say yes.", "completion": " yes"}\n' * 40)
    run(only(covered("--to imported")), checkout, small=False)
    assert "ok" in run(only(covered("verify --hf")), checkout, small=False).stdout
    run(only(covered("--to with_null_experts")), checkout, small=False)
    done = run(with_port(only(covered("launch/finetune.py"))) + " model.sequence_length=32", checkout, small=False)
    assert "saved runs/tuned/checkpoints" in done.stdout


def test_report_and_plan_commands(checkout) -> None:
    if not (checkout / "runs" / "full" / "checkpoints").exists():
        run(with_port(only("configs/quickstart.yaml run.name=full")), checkout)
    run(only(covered("tools/inspect_routing.py")), checkout, small=False)
    assert "<html" in (checkout / "report.html").read_text()
    assert "tokens/s" in run(only(covered("tools/plan.py")), checkout, small=False).stdout


def write_mixtral(directory: Path, text: str) -> None:
    """A tiny Mixtral with random weights and a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        sliding_window=None,
    )
    MixtralForCausalLM(config).save_pretrained(directory)
    whole.save_pretrained(directory)


def test_tensorboard_command_serves_the_run(checkout) -> None:
    command = only(covered("tensorboard.main")) + f" --port {free_port()}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=checkout,
        env=environment_of_commands({}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in iter(process.stderr.readline, ""):
            said.append(line)
            if "TensorBoard" in line:
                return
        raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.wait(timeout=20)


def on_two_nodes(commands: list[str], checkout: Path) -> None:
    """Run each node's command, both on this machine."""
    environment = {"PYTHONPATH": str(checkout)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        full = [f"{command} {' '.join(SMALL)}" for command in commands]
        waiting = [pool.submit(run_command, ["bash", "-c", c], checkout, 300, environment) for c in full]
        finished = [future.result() for future in waiting]
    assert all(done.returncode == 0 for done in finished), finished
    assert "ranks: 2 = data 2" in finished[0].stdout + finished[1].stdout


def test_two_nodes_by_hostfile_without_ssh(checkout) -> None:
    """The command of each node: one slot each."""
    template = only(covered("--no_ssh")).replace("node0 ", "127.0.0.1 ").replace("=cluster", "=no_ssh")
    port = free_port()
    on_two_nodes([template.replace("rank 0", f"rank {node} --master_port {port}") for node in (0, 1)], checkout)


def test_two_nodes_by_torchrun(checkout) -> None:
    template = only(covered("torchrun --nnodes 2")).replace("node0 ", "127.0.0.1 ").replace("per-node 8", "per-node 1")
    port = free_port()
    on_two_nodes([template.replace("rank 0", f"rank {node} --master-port {port}") for node in (0, 1)], checkout)


def test_slurm_command_names_the_template() -> None:
    """What is in it is run by test_slurm.py."""
    words = only(SLURM).split()
    assert (REPOSITORY / words[1]).read_text().startswith("#!/bin/bash")


SSH = """#!/bin/bash
# Stands in for ssh: runs the command here, whatever the host.
while [[ $1 == -* ]]; do [[ $1 == -o || $1 == -p ]] && shift; shift; done
shift; exec bash -c "$*"
"""
PDSH = """#!/bin/bash
# Stands in for pdsh: runs the command here once a host, with %n as the host's number, in the bare environment that ssh
# gives, and notes what the command exported.
while [[ $1 == -* ]]; do case $1 in -w) hosts=$2; shift;; -f) shift;; esac; shift; done
number=0; status=0
for host in ${hosts//,/ }; do
  then="status=\\$?; export -p > arrived$number; exit \\$status"
  env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$number}; $then" &
  pids+=($!); number=$((number + 1))
done
for pid in ${pids[@]}; do wait $pid || status=$?; done
exit $status
"""


def test_two_nodes_by_hostfile_started_once(checkout) -> None:
    """The command that starts every node, with stand-ins for ssh and pdsh, which this machine has no hosts for.

    The nodes have an empty environment but for what DeepSpeed and ``.deepspeed_env`` export.
    """
    (checkout / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\nOMP_NUM_THREADS=1\n")
    tools = checkout / "stand_ins"
    tools.mkdir()
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    command = with_port(only(covered("--hostfile hostfile launch/pretrain.py"))).replace("=cluster", "=started_once")
    done = run(f"export PATH={tools}:$PATH; {command}", checkout)
    assert "ranks: 2 = data 2" in done.stdout and "step 2/2" in done.stdout
    for node in (0, 1):
        arrived = (checkout / f"arrived{node}").read_text()
        assert 'GLOO_SOCKET_IFNAME="lo"' in arrived and 'OMP_NUM_THREADS="1"' in arrived and "PYTHONPATH" in arrived


@pytest.mark.slow
def test_quickstart(checkout) -> None:
    """``make quickstart``: to the end, within its promises."""
    shutil.rmtree(checkout / "runs" / "quickstart", ignore_errors=True)
    shutil.rmtree(checkout / "data", ignore_errors=True)
    (checkout / ".venv").symlink_to(REPOSITORY / ".venv")
    command = only(covered("make quickstart")).replace("make ", "make -o .venv/.installed ")
    output = run(command, checkout, small=False, timeout_s=900).stdout
    before, after = map(float, re.search(r"validation loss: ([\d.]+) before, ([\d.]+) after", output).groups())
    entropy = float(re.search(r"unigram entropy of the validation text: ([\d.]+)", output).group(1))
    assert after < before - 2.5 and after < entropy
    rows, undeduplicated = map(int, re.search(r"last step: (\d+), un-deduplicated (\d+)", output).groups())
    assert 0 < rows < undeduplicated
    assert "sample, continuing" in output and "bits per byte" in output and "tensorboard.main" in output


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    """A command that is added to the README needs a test above."""
    fragments = fragments_run(Path(__file__).read_text())
    untested = [
        command
        for command in COMMANDS
        if command not in ("deepspeed launch/pretrain.py", SLURM)
        and not any(fragment in command for fragment in fragments)
    ]
    assert not untested
