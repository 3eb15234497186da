"""Users of the service for locust: whole replies, streams read to the end, streams left early, probes."""
import json
import random

import locust

QUESTIONS = ["What is 1+1?", "Tom has 3 pens. Tom buys 4 more. How many pens does Tom have now?", "Hi"]


class User(locust.HttpUser):
    wait_time = locust.between(0.01, 0.1)

    def ask(self, **more):
        mode = random.choice(["off", "soft", "gumbel"])
        return {"model": "tiny", "messages": [{"role": "user", "content": random.choice(QUESTIONS)}], "max_tokens": 40,
                "soft_thinking": {"mode": mode}, **more}

    @locust.task(4)
    def whole(self):
        with self.client.post("/v1/chat/completions", json=self.ask(), catch_response=True) as response:
            if response.status_code != 200 or not response.json()["usage"]["completion_tokens"]:
                response.failure(response.text)

    @locust.task(4)
    def stream(self):
        with self.client.post("/v1/chat/completions", json=self.ask(stream=True), catch_response=True, stream=True, name="stream") as response:
            events = [line for line in response.iter_lines() if line]
            if response.status_code != 200 or events[-1] not in ("data: [DONE]", b"data: [DONE]"):
                response.failure(str(events[-1:]))

    @locust.task(1)
    def leave_early(self):
        with self.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True},
                              stream=True, catch_response=True, name="left early") as response:
            next(response.iter_lines(), None)
            response.success()

    @locust.task(1)
    def probe(self):
        with self.client.get("/health", catch_response=True) as response:
            if json.loads(response.text) != {"status": "ok"}:
                response.failure(response.text)
