"""What is done to a system while it is called, whichever registry it has: `whole` says whether all is there again."""

from collections.abc import Callable, Sized

from tests.kind.system import RELEASE, SERVICES, STAYS, System, eventually

Whole = Callable[[], bool]


def rolling_restart(called: System, whole: Whole) -> None:
    before = {service: called.pods(service) for service in SERVICES}
    with called.trouble("rolling restart of every Deployment"):
        called.kubectl("rollout", "restart", *called.deployments())
        for deployment in called.deployments():
            called.rolled_out(deployment)
    for service in SERVICES:
        assert not {*before[service]} & {*called.pods(service)}
    eventually("all are registered again", whole)


def scaling(called: System, whole: Whole, passing: Callable[[str], Sized]) -> None:
    with called.trouble("scale sum from 3 to 5 to 2") as seen:
        called.kubectl("scale", f"deployment/{RELEASE}-sum", "--replicas=5")
        called.rolled_out(f"deployment/{RELEASE}-sum")
        eventually("five are ready", lambda: len(called.pods("sum")) == 5)
        five = {*called.pods("sum")}
        eventually("each of the five is called", lambda: five <= {*seen().answered})
        called.kubectl("scale", f"deployment/{RELEASE}-sum", "--replicas=2")
        eventually("two are left", lambda: len(passing("sum")) == 2)
    called.kubectl("scale", f"deployment/{RELEASE}-sum", "--replicas=3")
    eventually("three are there again", whole)


def deletion_without_grace(called: System, whole: Whole) -> None:
    with called.trouble("delete a pod of sum, hello, greeter and student without grace"):
        gone = [called.pods(service)[0] for service in ("sum", "hello", "greeter", "student")]
        called.kubectl("delete", "pod", *gone, "--grace-period=0", "--force")
        eventually("others are there instead", whole, 120)


def draining_a_node(called: System, whole: Whole) -> None:
    nodes = called.kind.get("nodes", "--selector", f"!{STAYS.partition('=')[0]}")["items"]
    node = nodes[-1]["metadata"]["name"]
    with called.trouble("drain and uncordon a node"):
        try:
            called.kind.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
            for deployment in called.deployments():
                called.rolled_out(deployment)
        finally:
            called.kind.kubectl("uncordon", node)
        eventually("all is whole", whole, 180)
