"""Who a process is in its job: all ranks see one run, each its own place in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Dict, List, Optional

import pytest
from tests.producer.processes import environment

from plarv.exceptions import ArgusConfigurationError
from plarv.identity import Identity, discover, validate_run_id

Env = Dict[str, str]


def torchrun(rank: int, world: int = 4, local_world: int = 2, **more: str) -> Env:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % local_world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "GROUP_RANK": str(rank // local_world),
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        **more,
    }


def slurm(rank: int, tasks: str, places: List[int], **more: str) -> Env:
    """As srun sets it; ``places`` holds the node of each rank."""
    node = places[rank]
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(places[:rank].count(node)),
        "SLURM_NODEID": str(node),
        "SLURM_NTASKS": str(len(places)),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        **more,
    }


def open_mpi(rank: int, world: int = 4, local_world: int = 4) -> Env:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_world),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_world),
        "OMPI_MCA_ess_base_jobid": "1234567",
    }


def mpich(rank: int, world: int = 2) -> Env:
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(world),
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": str(world),
    }


JOBS: Dict[str, List[Env]] = {
    "torchrun on two nodes": [torchrun(rank, TORCHELASTIC_RUN_ID="job7") for rank in range(4)],
    "torchrun on one node, no id": [torchrun(rank, 2) for rank in range(2)],
    "srun on one node": [slurm(rank, "3", [0, 0, 0]) for rank in range(3)],
    "srun on two unequal nodes": [slurm(rank, "2,1", [0, 0, 1]) for rank in range(3)],
    "srun on three equal nodes": [slurm(r, "2(x3)", [0, 0, 1, 1, 2, 2]) for r in range(6)],
    "torchrun under srun": [
        {**slurm(0, "1", [0]), **torchrun(rank, 2), "SLURM_NTASKS": "1"} for rank in range(2)
    ],
    "mpirun of Open MPI": [open_mpi(rank) for rank in range(4)],
    "mpirun of Open MPI on two nodes": [open_mpi(rank, 4, 2) for rank in range(4)],
    "mpiexec of MPICH": [mpich(rank) for rank in range(2)],
    "a launcher of one's own": [
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        for rank in range(2)
    ],
}
LOCAL_WORLDS = {
    "torchrun on two nodes": [2, 2, 2, 2],
    "torchrun on one node, no id": [2, 2],
    "srun on one node": [3, 3, 3],
    "srun on two unequal nodes": [2, 2, 1],
    "srun on three equal nodes": [2, 2, 2, 2, 2, 2],
    "torchrun under srun": [2, 2],
    "mpirun of Open MPI": [4, 4, 4, 4],
    "mpirun of Open MPI on two nodes": [2, 2, 2, 2],
    "mpiexec of MPICH": [2, 2],
}


@pytest.mark.parametrize("job", JOBS)
def test_every_rank_knows_its_place_and_all_share_one_run(job: str) -> None:
    ranks = [discover(None, env) for env in JOBS[job]]
    assert [who.rank for who in ranks] == list(range(len(ranks)))
    assert {who.world_size for who in ranks} == {len(ranks)}
    assert len({who.run_id for who in ranks}) == 1
    assert validate_run_id(ranks[0].run_id) == ranks[0].run_id


@pytest.mark.parametrize("job", LOCAL_WORLDS)
def test_every_rank_knows_how_many_are_on_its_node(job: str) -> None:
    ranks = [discover(None, env) for env in JOBS[job]]
    assert [who.local_world_size for who in ranks] == LOCAL_WORLDS[job]
    leaders = [who for who in ranks if who.local_rank == 0]
    assert sum(who.local_world_size for who in leaders) == len(ranks)


def test_a_process_alone_is_rank_0_of_1_with_an_id_of_its_own() -> None:
    first, second = discover(None, {}), discover(None, {})
    assert first[1:] == Identity("", 0, 1, 0, 1, None)[1:]
    assert first.run_id != second.run_id


@pytest.mark.parametrize("job", JOBS)
def test_an_id_that_is_given_goes_before_the_launchers(job: str) -> None:
    assert {discover("mine", env).run_id for env in JOBS[job]} == {"mine"}


def test_a_batch_script_outside_srun_is_a_process_alone() -> None:
    env = slurm(0, "4", [0, 0, 0, 0])
    del env["SLURM_STEP_ID"]
    assert discover(None, env)[1:] == (0, 1, 0, 1, None)


def test_two_steps_of_one_slurm_job_are_two_runs() -> None:
    first = discover(None, slurm(0, "2", [0, 0]))
    second = discover(None, slurm(0, "2", [0, 0], SLURM_STEP_ID="1"))
    assert first.run_id != second.run_id


def test_a_restart_by_torchrun_is_counted_and_keeps_its_run() -> None:
    ids = set()
    for restart in range(2):
        env = torchrun(0, 2, MASTER_PORT=str(29500 + restart))
        env["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        who = discover(None, env)
        assert who.restart_count == restart
        ids.add(who.run_id)
    assert len(ids) == 1


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "x", "WORLD_SIZE": "y"},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "0"},
        {"WORLD_SIZE": ""},
        slurm(0, "odd", [0, 0]),
        slurm(1, "2", [0, 1]),
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "9"},
    ],
)
def test_an_environment_that_makes_no_sense_gives_a_rank_all_the_same(env: Env) -> None:
    who = discover(None, env)
    assert 0 <= who.rank < who.world_size
    assert 1 <= who.local_world_size <= who.world_size


def test_a_launchers_id_is_brought_to_what_can_name_a_folder() -> None:
    who = discover(None, torchrun(0, TORCHELASTIC_RUN_ID="my job/7:" + "x" * 200))
    assert validate_run_id(who.run_id).startswith("torchrun-my-job-7-")


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "a b", "ä", "-x", "x\n", "x" * 129])
def test_an_id_that_cannot_name_a_folder_is_refused(run_id: str) -> None:
    with pytest.raises(ArgusConfigurationError, match="run_id must be"):
        validate_run_id(run_id)


def test_processes_of_one_parent_share_an_id_without_a_word_between_them() -> None:
    """The plainest launcher there is: a shell loop that sets RANK and WORLD_SIZE."""
    program = "import json; from plarv.identity import discover; print(json.dumps(discover(None)))"

    def ids(port: Optional[str] = None) -> List[str]:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port or "1"),
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        return [json.loads(rank.communicate()[0])[0] for rank in ranks]

    first, again, other = ids(), ids(), ids("2")
    assert first[0] == first[1]
    assert again == first  # a restart by the same parent is the same run
    assert other[0] == other[1] != first[0]
    assert all(os.sep not in run_id for run_id in first)
