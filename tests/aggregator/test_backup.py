"""Backups: complete, taken while a server works, and good to continue from."""

import threading

import pytest
import toy_run
from server_process import Client

from edgefed.aggregator.backup import back_up
from edgefed.errors import ConfigError, StateCorrupt


def updates_of(manifest, names: str = "ab") -> list[toy_run.Update]:
    units = [unit for unit in manifest.units if unit.trainable]
    return [toy_run.make_update(manifest, name, toy_run.trained(units, ord(name))) for name in names]


def test_a_run_goes_on_from_a_backup_taken_while_it_is_served(tmp_path, state, start_server):
    server = start_server(state)
    clients = {name: Client(server.url, name) for name in "ab"}
    for client in clients.values():
        client.register()
    manifest = clients["a"].manifest()
    first, second = updates_of(manifest)
    while "Assignment" not in type(clients["a"].assignment(wait_s=1.0)).__name__:
        pass
    clients["a"].send(first)
    clients["b"].put(second.meta, second.frame[:1000])

    found = back_up(state, tmp_path / "copy")
    assert found.server_round == 1
    clients["b"].put(second.meta, second.frame[1000:], offset=1000)
    clients["b"].commit(second.meta)
    expected = {unit.key: unit.sha256 for unit in clients["a"].wait_for_round(2).units}
    server.kill()

    restored = start_server(tmp_path / "copy")
    again = {name: Client(restored.url, name) for name in "ab"}
    assert again["a"].status().updates_received == 1, "what was acknowledged is in the copy"
    assert again["a"].commit(first.meta), "and acknowledged again"
    assert again["b"].offset(second.meta) == (0, "partial"), "what was not begins again"
    again["b"].send(second)
    assert {unit.key: unit.sha256 for unit in again["b"].wait_for_round(2).units} == expected
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0


def test_backups_are_complete_while_rounds_end(tmp_path):
    toy = toy_run.Toy(toy_run.make_run(tmp_path / "state", rounds=15), keep_rounds=1)
    toy.join("a", "b")
    problems: list[BaseException] = []

    def train() -> None:
        try:
            for _ in range(15):
                for update in updates_of(toy.manifest()):
                    toy.send(update)
                toy.run.fold_pending()
        except BaseException as error:
            problems.append(error)

    training = threading.Thread(target=train)
    training.start()
    rounds = []
    for number in range(200):
        rounds.append(back_up(tmp_path / "state", tmp_path / f"copy{number}").server_round)
        if not training.is_alive():
            break
    training.join()
    toy.close()
    assert not problems
    assert rounds == sorted(rounds)
    assert len(set(rounds)) > 1, "rounds ended meanwhile"
    for number, server_round in enumerate(rounds):
        copy = toy_run.Toy(tmp_path / f"copy{number}")  # checks that every blob exists and has its size
        assert copy.service.status().history[-1:] == copy.service.status().history[server_round - 2 : server_round - 1]
        copy.close()


def test_a_damaged_file_and_a_folder_in_use_are_named_and_nothing_is_left(tmp_path, state, toy):
    sha256 = toy.manifest().units[0].sha256
    path = toy.service.blob(sha256)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(StateCorrupt, match=f"{sha256[:8]}.* is damaged"):
        back_up(state, tmp_path / "backups" / "copy")
    assert not list((tmp_path / "backups").iterdir())
    with pytest.raises(ConfigError, match="not empty"):
        back_up(state, state)
