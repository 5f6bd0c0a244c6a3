"""The time of scoring as a share of an iteration, with and without scoring while the rollout is drawn; and that both train the same LoRA.

    python benchmarks/early_scores.py [--delay SECONDS] [--iterations N]

The quickstart, in micro-batches of eight, with a reward server on loopback that takes `delay` for each call of eight pictures, two calls at once. "afterwards" is the same
graph with Group Sample's images linked to Score, whose own pictures are then scored when all are drawn. The first iteration is left out.
"""

import argparse
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file

from comfy_dancegrpo import nodes
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info

ROOT = Path(__file__).resolve().parent.parent
LOOP_END = 11  # what comes after it in the quickstart is left out


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, delay = "HTTP/1.1", 0.0

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.delay)
        scores = [sum(sample["png"].encode()) % 1009 / 1009 for sample in request["samples"]]
        data = json.dumps({"protocol": "dancegrpo-reward", "version": 1, "name": "bytes", "count": len(scores), "scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def flow(port: int, afterwards: bool) -> dict:
    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    whole = to_prompt(read_workflow(ROOT / "workflows/quickstart.json"), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))
    prompt = {node_id: node for node_id, node in whole.items() if int(node_id) <= LOOP_END}
    ids = {node["class_type"]: node_id for node_id, node in prompt.items()}
    score, sample = prompt[ids["DanceGRPOScore"]]["inputs"], ids["DanceGRPOGroupSample"]
    prompt[score["reward"][0]] = {"class_type": "DanceGRPORemoteReward", "inputs": {
        "address": f"http://127.0.0.1:{port}/score", "reward": "", "batch_size": 8, "connections": 2, "timeout": 60.0, "retries": 0}}
    prompt[ids["DanceGRPOLoopStart"]]["inputs"]["micro_batch"] = 8  # of 32: the quickstart's own takes all at once
    if afterwards:
        score["images"] = [sample, 1]
    return prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=1.0)
    parser.add_argument("--iterations", type=int, default=6)
    given = parser.parse_args()
    Handler.delay = given.delay
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    loras = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("afterwards", "early"):
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(flow(server.server_port, name == "afterwards")))
            done = subprocess.run([sys.executable, "-m", "comfy_dancegrpo.trainer", "run", path, "--output", Path(folder) / name,
                                   "--iterations", str(given.iterations), "--allow-host", "127.0.0.1"], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows = [json.loads(line)["seconds"] for line in (Path(folder) / name / "quickstart/metrics.jsonl").read_text().splitlines()][1:]
            seconds = {phase: mean(row[phase] for row in rows) for phase in ("denoise", "decode", "reward", "update", "total")}
            print(f"{name:10}  " + "  ".join(f"{phase} {value:5.2f} s" for phase, value in seconds.items())
                  + f"  scoring {seconds['reward'] / seconds['total']:.0%} of an iteration", flush=True)
            (lora,) = (Path(folder) / name / "quickstart/lora").iterdir()
            loras.append(load_file(lora))
    same = loras[0].keys() == loras[1].keys() and all(loras[0][key].equal(loras[1][key]) for key in loras[0])
    print("the LoRAs are equal, bit for bit" if same else "THE LORAS DIFFER")
    sys.exit(not same)


if __name__ == "__main__":
    main()
