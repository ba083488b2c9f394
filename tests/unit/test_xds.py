"""What gRPC is told: names that survive the way there, and the settings in the resources."""

import itertools
import re

import pytest

from rollcall.discovery import xds
from rollcall.settings import CallSettings

NAMES = [
    "sum",
    "SUM",
    "grpc And consul",
    "grpc%20And",
    "a/b",
    "a?b",
    "a#b",
    "a~b",
    "a~~b",
    "a%7Eb",
    "~",
    "點名",
    "a+b",
    "a&b",
]


def test_every_name_and_tag_has_a_key_of_its_own_that_a_uri_carries_unchanged() -> None:
    pairs = list(itertools.product(NAMES, ["", *NAMES]))
    keys = [xds.key_of(name, tag) for name, tag in pairs]
    assert len(set(keys)) == len(pairs)
    assert all(re.fullmatch(r"[A-Za-z0-9._~-]+", key) for key in keys)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_looks_like_one_that_is_numbered(name: str) -> None:
    assert "~~~" not in xds.key_of(name)


def test_resources_are_named_under_our_authority() -> None:
    name = xds.resource_name(xds.CLUSTER, "sum")
    assert name == "xdstp://rollcall/envoy.config.cluster.v3.Cluster/sum"


def test_retries_are_for_the_methods_that_are_idempotent() -> None:
    paths = ["/a.A/Get", "/a.A/List"]
    retrying = str(xds.listener("k", paths, CallSettings(retries=2)))
    assert all(path in retrying for path in paths)
    assert "/a.A/Get" not in str(xds.listener("k", paths, CallSettings(retries=0)))


def test_the_settings_are_in_the_cluster() -> None:
    settings = CallSettings(max_requests=7, failure_percent=60, ejection=9, ejection_percent=40)
    told = xds.cluster("k", settings)
    assert told.circuit_breakers.thresholds[0].max_requests.value == 7
    outliers = told.outlier_detection
    assert outliers.failure_percentage_threshold.value == 60
    assert outliers.max_ejection_time.seconds == 9
    assert outliers.max_ejection_percent.value == 40
    assert outliers.enforcing_failure_percentage.value == 100
    assert not xds.cluster("k", CallSettings(failure_percent=0)).HasField("outlier_detection")


def test_endpoints_have_their_weights() -> None:
    (locality,) = xds.endpoints("k", [("dc1", [("10.0.0.1", 80, 1), ("::1", 81, 3)])]).endpoints
    told = [
        (each.endpoint.address.socket_address.address, each.load_balancing_weight.value)
        for each in locality.lb_endpoints
    ]
    assert told == [("10.0.0.1", 1), ("::1", 3)]


def test_localities_have_their_priorities_without_a_gap() -> None:
    told = xds.endpoints("k", [("dc2", [("10.0.0.1", 80, 1)]), ("dc3", [("10.0.0.2", 80, 1)])]).endpoints
    assert [(each.locality.region, each.priority) for each in told] == [("dc2", 0), ("dc3", 1)]


@pytest.mark.parametrize(("seconds", "whole", "nanos"), [(0, 0, 0), (0.025, 0, 25_000_000), (4.5, 4, 500_000_000)])
def test_durations(seconds: float, whole: int, nanos: int) -> None:
    told = xds.duration(seconds)
    assert (told.seconds, told.nanos) == (whole, nanos)
