"""Two processes of four devices each, joined on loopback, make the masks that one process makes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import jaxprune
from tests.support import two_processes

pytestmark = pytest.mark.optimised

SCRIPT = pathlib.Path(__file__).parent / "support" / "two_processes.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_make_the_masks_of_one():
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(SCRIPT), f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = {
        name: two_processes.hash_of(jaxprune.make_masks(two_processes.weights(), k, rule=rule))
        for name, (rule, k) in two_processes.RULES.items()
    }
    for process, (output, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
        found = json.loads(output.splitlines()[-1])
        assert found["devices"] == [4, 8]
        assert len(found["hashes"]) == 2 * len(expected)
        for case, digest in found["hashes"].items():
            assert digest == expected[case.partition("/")[0]], case
