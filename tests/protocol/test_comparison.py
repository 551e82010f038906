"""Comparisons of clients by name."""

from types import SimpleNamespace

from edgefed.protocol.comparison import Comparison, comparisons_by_name


def test_clients_of_the_same_name_stay_apart():
    first, second = Comparison(server_round=2, before=3.0), Comparison(server_round=2, before=4.0)
    clients = [
        SimpleNamespace(client_id="a" * 32, name="vm", comparison=first),
        SimpleNamespace(client_id="b" * 32, name="vm", comparison=second),
        SimpleNamespace(client_id="c" * 32, name="kitchen", comparison=second),
        SimpleNamespace(client_id="d" * 32, name="cellar", comparison=None),
    ]
    assert comparisons_by_name(clients) == {"vm (aaaaaaaa)": first, "vm (bbbbbbbb)": second, "kitchen": second}
