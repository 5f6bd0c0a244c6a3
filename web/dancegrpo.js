// The live panel on Loop End. ComfyUI's frontend imports this file; so does the bundled editor, which has the same frontend.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { attach } from "./panel/attach.js";

// the frontend calls a message that no one listens to an error; before its graph is loaded, and without a Loop End, no one does
api.addEventListener("dancegrpo.run", () => {});

app.registerExtension({
  name: "DanceGRPO.Panel",
  nodeCreated(node) {
    if (node.comfyClass === "DanceGRPOLoopEnd") attach(node, app, api);
  },
});
