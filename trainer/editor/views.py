"""Jobs as ComfyUI's /queue, /history and /jobs show them."""

from __future__ import annotations

from typing import Any

from .jobs import Job

_SHOWN = ("images", "gifs", "video", "audio")  # kinds of output that a page can preview


def queue_item(job: Job) -> list[Any]:
    outputs = job.output_nodes if job.outputs is None else job.outputs
    return [job.number, job.id, job.prompt, {**job.extra_data, "client_id": job.client_id}, outputs]


def history_entry(job: Job) -> dict[str, Any]:
    meta = {n: {"node_id": n, "display_node": n, "parent_node": None, "real_node_id": n} for n in job.results}
    status = {"status_str": "success" if job.state == "completed" else "error", "completed": job.state == "completed",
              "messages": job.messages}
    return {"prompt": queue_item(job), "outputs": job.results, "status": status, "meta": meta}


def job_entry(job: Job) -> dict[str, Any]:
    """A row of /jobs."""
    files = [{**file, "nodeId": node_id, "mediaType": kind} for node_id, ui in job.results.items() for kind in _SHOWN
             for file in ui.get(kind) or [] if isinstance(file, dict) and "filename" in file]
    kept = [file for file in files if file.get("type") == "output"]
    workflow = (job.extra_pnginfo or {}).get("workflow")
    return {
        "id": job.id, "status": job.state, "priority": job.number, "create_time": job.created, "execution_start_time": job.started,
        "execution_end_time": job.ended, "preview_output": (kept or files or [None])[0], "outputs_count": len(files),
        "previewable_outputs_count": len(files), "execution_error": job.error,
        "workflow_id": workflow.get("id") if isinstance(workflow, dict) and isinstance(workflow.get("id"), str) else None,
    }


def job_detail(job: Job) -> dict[str, Any]:
    """/jobs/{id}: the row, the workflow and all outputs."""
    entry = history_entry(job)
    return {**job_entry(job), "workflow": {"prompt": job.prompt, "extra_data": job.extra_data}, "outputs": job.results,
            "update_time": job.ended or job.started or job.created, "execution_status": entry["status"], "execution_meta": entry["meta"]}
