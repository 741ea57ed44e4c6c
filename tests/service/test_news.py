"""Streams that wait are woken by one look for all of them."""

import asyncio

import pytest
from sqlalchemy import event

from service.common import repository
from service.common.events import EventType, log_data
from service.jobs import Service
from service.news import News


@pytest.fixture
def service(settings, migrated):
    service = Service(settings)
    yield service
    service.close()


def tell(database, job):
    with database.write() as session:
        repository.append_event(session, repository.get_job(session, job.id), EventType.LOG, log_data("told", "x"))


def test_one_look_is_for_all_who_wait(service, api_hand, migrated):
    jobs, looks = [api_hand.insert() for _ in range(3)], []
    event.listen(service.database.engine, "before_cursor_execute", lambda *call: looks.append(call[2]))

    async def follow():
        news = News(service)
        waiting = [asyncio.create_task(news.wait(job.id, 1, 30)) for job in jobs for _ in range(20)]
        while len(looks) < 3:
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(tell, migrated, jobs[0])
        assert await asyncio.gather(*waiting[:20]) == [True] * 20
        assert not any(task.done() for task in waiting[20:])
        for task in waiting[20:]:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return news

    news = asyncio.run(follow())
    assert len(looks) < 20, "60 followers, and a look for each would be as many"
    assert news._followers == {}


def test_what_came_before_is_told_and_silence_is_not(service, api_hand, migrated):
    told, quiet = api_hand.insert(), api_hand.insert()
    tell(migrated, told)

    async def follow():
        news = News(service)
        return await asyncio.gather(news.wait(told.id, 1, 30), news.wait(quiet.id, 1, 0.6))

    assert asyncio.run(follow()) == [True, False]


def test_a_database_that_does_not_answer_is_left_to_each_stream(service, api_hand):
    job = api_hand.insert()
    service.database.engine.dispose()
    event.listen(
        service.database.engine, "begin", lambda connection: connection.exec_driver_sql("SELECT 1 FROM nowhere")
    )
    assert asyncio.run(News(service).wait(job.id, 1, 30))
