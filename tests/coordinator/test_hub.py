"""Who waits is woken from any thread; what happens between two waits is not missed."""

import asyncio

from murmur.coordinator.hub import ALL, EVERYBODY, Hub


def test_a_wake_reaches_whoever_waits_under_the_name_and_nobody_else():
    async def wait() -> list[bool]:
        hub = Hub()
        hub.attach(asyncio.get_running_loop())
        hub.wake(["a"])  # nobody is here yet
        with hub.parked("a") as a, hub.parked("b") as b, hub.parked(EVERYBODY) as page:
            early = await a.wait(0.01)
            await asyncio.to_thread(hub.wake, ["a", "gone"])
            named = [await a.wait(60), await b.wait(0.01)]
            await asyncio.to_thread(hub.committed, 7)
            pages = [await page.wait(60), await b.wait(0.01)]
            await asyncio.to_thread(hub.wake, [ALL])
            return [early, *named, *pages, await b.wait(60)]

    assert asyncio.run(wait()) == [False, True, False, True, False, True]


def test_a_name_has_a_new_number_after_each_wake_of_it_or_of_all():
    hub = Hub()
    hub.wake(["a"])
    first = hub.woken("a")
    hub.wake(["b"])
    assert hub.woken("a") == first > hub.woken("c") == 0
    hub.wake([ALL])
    assert hub.woken("a") == hub.woken("b") == hub.woken("c") > first
