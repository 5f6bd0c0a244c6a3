"""Running workflows: /prompt, /queue, /interrupt, /history, /jobs, /free and the WebSocket."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import Any

from aiohttp import web

from comfy_dancegrpo.errors import WorkflowError

from . import problems, views
from .editor import Editor
from .files import Refused, read_object
from .jobs import MOST_WAITING, Job, now

_LONGEST_ID = 128
_NOT_OURS = ("auth_token_comfy_org", "api_key_comfy_org")  # the frontend may send an account's keys along; they are not kept


def add(routes: web.RouteTableDef, editor: Editor) -> None:
    jobs = editor.jobs

    @routes.get("/ws")
    async def socket(request: web.Request) -> web.StreamResponse:
        if editor.hub.full:
            raise Refused(429, "too many pages are open")
        return await editor.hub.serve(request, jobs.greeting)

    @routes.get("/prompt")
    async def status(request: web.Request) -> web.Response:
        return web.json_response(jobs.status())

    @routes.post("/prompt")
    async def prompt(request: web.Request) -> web.Response:
        body = await read_object(request)
        if not isinstance(body.get("prompt"), dict):
            return _refused("no_prompt", "No prompt provided", "the body has no object 'prompt'")
        if len(jobs.waiting) >= MOST_WAITING:
            return _refused("queue_full", "The queue is full", f"{MOST_WAITING} jobs are waiting; cancel some of them first", 429)
        job = _job(body, editor)
        try:
            await asyncio.to_thread(editor.check, job.prompt)
        except WorkflowError as error:
            return web.json_response(problems.answer(error.problems, job.prompt, job.output_nodes), status=400)
        if job.outputs is not None and not job.outputs:
            return _refused("prompt_no_outputs", "Prompt has no outputs", "none of partial_execution_targets is an output node")
        jobs.put(job)
        return web.json_response({"prompt_id": job.id, "number": job.number, "node_errors": {}})

    @routes.get("/queue")
    async def queue(request: web.Request) -> web.Response:
        running = [jobs.running] if jobs.running else []
        return web.json_response({"queue_running": list(map(views.queue_item, running)),
                                  "queue_pending": list(map(views.queue_item, jobs.waiting))})

    @routes.post("/queue")
    async def change_queue(request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("clear"):
            jobs.clear()
        for job_id in _ids(body, "delete"):
            jobs.cancel(job_id)
        return web.json_response({})

    @routes.post("/interrupt")
    async def interrupt(request: web.Request) -> web.Response:
        body = await read_object(request) if request.can_read_body else {}
        jobs.interrupt(body.get("prompt_id"))
        return web.json_response({})

    @routes.post("/free")
    async def free(request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("unload_models") or body.get("free_memory"):
            jobs.free()
        return web.json_response({})

    @routes.get("/history")
    async def history(request: web.Request) -> web.Response:
        kept = list(jobs.history.values())
        most, offset = _number(request, "max_items", len(kept)), _number(request, "offset", -1)
        start = max(len(kept) - most, 0) if offset < 0 else offset
        return web.json_response({job.id: views.history_entry(job) for job in kept[start:start + most]})

    @routes.get("/history/{job_id}")
    async def one_of_history(request: web.Request) -> web.Response:
        job = jobs.history.get(request.match_info["job_id"])
        return web.json_response({job.id: views.history_entry(job)} if job else {})

    @routes.post("/history")
    async def change_history(request: web.Request) -> web.Response:
        body = await read_object(request)
        for job_id in list(jobs.history) if body.get("clear") else _ids(body, "delete"):
            jobs.forget(job_id)
        return web.json_response({})

    @routes.get("/jobs")
    async def list_jobs(request: web.Request) -> web.Response:
        states = set(filter(None, request.query.get("status", "").split(",")))
        found = [job for job in jobs.all() if not states or job.state in states]
        if request.query.get("sort_order") == "asc":
            found.reverse()
        offset, limit = max(_number(request, "offset", 0), 0), max(_number(request, "limit", 200), 0)
        page = {"offset": offset, "limit": limit, "total": len(found), "has_more": offset + limit < len(found)}
        return web.json_response({"jobs": list(map(views.job_entry, found[offset:offset + limit])), "pagination": page})

    @routes.post("/jobs/cancel")
    async def cancel_jobs(request: web.Request) -> web.Response:
        for job_id in _ids(await read_object(request), "job_ids"):
            _cancel(job_id)
        return web.json_response({})

    @routes.get("/jobs/{job_id}")
    async def one_job(request: web.Request) -> web.Response:
        job = jobs.find(request.match_info["job_id"])
        if job is None:
            raise Refused(404, "no such job")
        return web.json_response(views.job_detail(job))

    @routes.post("/jobs/{job_id}/cancel")
    async def cancel_job(request: web.Request) -> web.Response:
        _cancel(request.match_info["job_id"])
        return web.json_response({})

    def _cancel(job_id: str) -> None:
        jobs.cancel(job_id)
        jobs.interrupt(job_id)


def _job(body: dict[str, Any], editor: Editor) -> Job:
    """The job that a body asks for, not yet checked. Raises `Refused` for what is no workflow's business."""
    extra = body.get("extra_data") or {}
    if not isinstance(extra, dict):
        raise Refused(400, "extra_data is not an object")
    job_id = str(body.get("prompt_id") or uuid.uuid4())
    if len(job_id) > _LONGEST_ID or not job_id.isprintable():
        raise Refused(400, f"found a prompt_id of {len(job_id)} characters, accepted: at most {_LONGEST_ID} printable ones")
    if any(job.id == job_id for job in [editor.jobs.running, *editor.jobs.waiting] if job):
        raise Refused(400, f"prompt_id {job_id!r} is in the queue already")
    number = body.get("number")
    if number is None:
        number = editor.jobs.number(bool(body.get("front")))
    elif isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise Refused(400, f"number: found {number!r}, accepted: a number")
    output_nodes, targets = editor.output_nodes(body["prompt"]), body.get("partial_execution_targets")
    outputs = None if targets is None else [n for n in output_nodes if isinstance(targets, list) and n in targets]
    client_id = body.get("client_id")
    return Job(job_id, float(number), body["prompt"], {key: value for key, value in extra.items() if key not in _NOT_OURS}, outputs,
               output_nodes, client_id if isinstance(client_id, str) and client_id else None, now())


def _refused(kind: str, message: str, details: str, status: int = 400) -> web.Response:
    return web.json_response({"error": {"type": kind, "message": message, "details": details, "extra_info": {}}, "node_errors": {}},
                             status=status)


def _ids(body: dict[str, Any], name: str) -> list[str]:
    found = body.get(name) or []
    if not isinstance(found, list):
        raise Refused(400, f"{name}: found {type(found).__name__}, accepted: a list of ids")
    return [one for one in found if isinstance(one, str)]


def _number(request: web.Request, name: str, default: int) -> int:
    try:
        return int(request.query.get(name, default))
    except ValueError:
        raise Refused(400, f"{name}: found {request.query[name]!r}, accepted: a whole number") from None
