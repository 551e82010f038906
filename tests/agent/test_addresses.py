"""Addresses, proxies and certificates: what is used, what is ignored, and what is refused by name."""

from __future__ import annotations

import httpx
import pytest

from edgefed.agent import addresses
from edgefed.agent.addresses import check_base_url, find_proxy, trusted_certificates
from edgefed.agent.backoff import is_transient
from edgefed.agent.object_storage import ObjectStorage
from edgefed.agent.transport import AggregatorClient
from edgefed.errors import ConfigError, ProtocolError, ServerUnreachable

SERVER = "http://box.example.org:8470"
PROXY = "http://proxy.lan:3128"


@pytest.mark.parametrize(
    "text",
    ["http://a..b:1", "http://.a:1", "http://" + "a" * 70 + ".de:1", "http://xn--:1", "http://[fe80::1%eth0]:1"],
)
def test_an_invalid_host_is_refused(text):
    with pytest.raises(ConfigError):
        check_base_url(text)


def test_the_error_about_an_address_zone_names_the_zone():
    with pytest.raises(ConfigError, match="with a zone are not supported"):
        check_base_url("http://[fe80::1%eth0]:9254")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://[::1]:9254", "http://[::1]:9254"),
        ("http://box.lan.:81", "http://box.lan.:81"),
        ("https://BOX.lan", "https://box.lan"),
        ("http://bücher.example:1", "http://xn--bcher-kva.example:1"),
    ],
)
def test_valid_hosts(text, url):
    assert check_base_url(text) == url


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1", "http://127.8.9.1:1", "http://[::1]:1", "http://localhost:1", "http://0.0.0.0:1",
        "http://[::ffff:127.0.0.1]:1",
    ],
)  # fmt: skip
def test_loopback_ignores_proxy_variables(url):
    for value in (PROXY, "socks://127.0.0.1:1080/", "http://user:p#ss@h:1"):
        assert find_proxy(url, {"HTTP_PROXY": value, "ALL_PROXY": value, "NO_PROXY": "fd07:b51a::/64"}) is None


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"HTTP_PROXY": PROXY}, "HTTP_PROXY"),
        ({"http_proxy": PROXY, "HTTP_PROXY": "http://other:1"}, "http_proxy"),
        ({"ALL_PROXY": "proxy.lan:3128"}, "ALL_PROXY"),
        ({"HTTPS_PROXY": PROXY}, None),
        ({"HTTP_PROXY": ""}, None),
    ],
)
def test_precedence_of_proxy_variables(environ, variable):
    proxy = find_proxy(SERVER, environ)
    assert (proxy and proxy.variable) == variable
    if proxy:
        assert (proxy.url.host, proxy.url.port) == ("proxy.lan", 3128)


@pytest.mark.parametrize(
    ("url", "no_proxy", "excluded"),
    [
        (SERVER, "example.org", True), (SERVER, ".example.org", True), (SERVER, "*.example.org", True),
        (SERVER, "ample.org", False), (SERVER, "*", True), (SERVER, "box.example.org:8470", True),
        (SERVER, "box.example.org:1", False), ("http://10.1.2.3:1", "10.0.0.0/8", True),
        ("http://10.1.2.3:1", "10.1.2.4", False), ("http://[fd07:b51a::5]:1", "localhost, fd07:b51a::/64", True),
        ("http://[fd07:b51a::5]:1", "[fd07:b51a::5]", True), ("http://[fd07::5]:1", "[::1] fd07:b51a::/64", False),
        ("http://10.1.2.3:1", "[::1],nonsense:::,//", False),
    ],
)  # fmt: skip
def test_no_proxy(url, no_proxy, excluded):
    assert (find_proxy(url, {"HTTP_PROXY": PROXY, "NO_PROXY": no_proxy}) is None) == excluded


@pytest.mark.parametrize(
    "value",
    [
        "http://user:p#ss@127.0.0.1:9299", "ftp://h:1", "http://", "http://h:port", "http://h:99999", "http://a..b:1",
        "http://[fe80::1%eth0]:1", "http://" + "a" * 70 + ".de:1",
    ],
)  # fmt: skip
def test_an_invalid_proxy_is_refused_with_its_variable_and_without_its_password(value):
    with pytest.raises(ConfigError, match="in HTTP_PROXY") as caught:
        find_proxy(SERVER, {"HTTP_PROXY": value})
    assert "p#ss" not in str(caught.value)
    assert "HTTP_PROXY" in caught.value.remedy


@pytest.mark.parametrize("value", ["socks://h:1080/", "socks5://h:1080"])
def test_a_socks_proxy_needs_its_package(value, monkeypatch):
    monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ALL_PROXY names a SOCKS proxy") as caught:
        find_proxy(SERVER, {"ALL_PROXY": value})
    assert "httpx[socks]" in caught.value.remedy
    monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: object())
    assert find_proxy(SERVER, {"ALL_PROXY": value}).url.scheme == "socks5"


def test_a_message_names_a_proxy_without_its_password():
    proxy = find_proxy(SERVER, {"HTTP_PROXY": "http://user:secret@[fd07::1]:3128"})
    assert proxy.describe() == "the proxy http://[fd07::1]:3128 of HTTP_PROXY"


def test_an_error_names_the_proxy_that_was_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with AggregatorClient("http://box.invalid:8470") as client, pytest.raises(ServerUnreachable) as caught:
        client.status()
    assert "through the proxy http://127.0.0.1:9 of HTTP_PROXY" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_loopback_bypasses_a_proxy(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with AggregatorClient(server.url) as client:
        assert client.manifest(1).server_round == 1


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_a_missing_certificate_file_is_named(variable, tmp_path):
    with pytest.raises(ConfigError, match=f"{variable} names a .* that does not exist: {tmp_path}"):
        trusted_certificates({variable: str(tmp_path / "gone.pem")})
    assert trusted_certificates({}) is True


def test_a_file_without_certificates_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE: no certificates in"):
        trusted_certificates({"SSL_CERT_FILE": str(tmp_path / "ca.pem")})


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "[fd00::1]", "[::ffff:10.0.0.1]"]
)
def test_a_server_on_the_internet_cannot_send_a_device_to_its_own_network(host):
    storage = ObjectStorage(httpx.Timeout(1.0), "http://8.8.8.8:8470")
    with pytest.raises(ProtocolError, match="is on the internet, but its object storage at"):
        storage.put(f"http://{host}/bucket/object", iter([b"x"]), 1)


def test_a_name_that_cannot_be_resolved_for_a_moment_is_tried_again():
    storage = ObjectStorage(httpx.Timeout(1.0), "http://8.8.8.8:8470")
    with pytest.raises(ServerUnreachable, match=r"the name bucket\.invalid cannot be resolved") as caught:
        storage.put("http://bucket.invalid/object", iter([]), 0)
    assert is_transient(caught.value, joined=True)


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("https://10.0.0.1", "http://10.0.0.2/object"),
        ("http://10.0.0.1", "ftp://10.0.0.2/object"),
        ("http://10.0.0.1", "x"),
    ],
)
def test_an_invalid_url_of_object_storage_is_refused(server, url):
    with pytest.raises(ProtocolError, match="invalid URL of object storage, expected http"):
        ObjectStorage(httpx.Timeout(1.0), server).put(url, iter([]), 0)
