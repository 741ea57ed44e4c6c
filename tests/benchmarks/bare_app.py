"""What FastAPI and SQLAlchemy take to insert a row, for `tests.benchmarks.load`: one table, one commit, no checks of ours."""

import os
import uuid
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import JSON
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.common.session import Database


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON()}  # noqa: RUF012


class Row(Base):
    __tablename__ = "bare_rows"

    id: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int]


class RowCreate(BaseModel):
    source: dict[str, Any]
    labels: dict[str, Any]
    priority: int


database = Database(os.environ["BARE_DATABASE_URL"])  # with the same care for what is committed
Base.metadata.create_all(database.engine)
app = FastAPI()


@app.post("/rows", status_code=201)
def create(body: RowCreate) -> dict[str, Any]:
    with database.write() as session:
        row = Row(id=uuid.uuid4().hex, **body.model_dump())
        session.add(row)
        session.flush()
        return {"id": row.id, **body.model_dump()}
