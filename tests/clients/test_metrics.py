"""R13 with the parser of prometheus-client."""
import httpx
from prometheus_client.parser import text_string_to_metric_families


def scrape(server):
    answer = httpx.get(server.url + "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families, name, **labels):
    return sum(s.value for f in families.values() for s in f.samples
               if s.name == "sfumato:" + name and labels.items() <= s.labels.items())


def test_types_and_series(server):
    families = scrape(server)
    kinds = {name.removeprefix("sfumato:"): family.type for name, family in families.items()}
    expected = {
        "histogram": "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
                     "request_inference_time_seconds time_to_first_token_seconds time_to_first_answer_token_seconds "
                     "inter_token_latency_seconds request_prompt_tokens request_generation_tokens request_params_max_tokens "
                     "request_params_n iteration_tokens_total soft_entropy_nats soft_support_size thinking_seconds step_seconds "
                     "http_request_duration_seconds",
        "counter": "prompt_tokens generation_tokens num_preemptions prefix_cache_queries prefix_cache_hits request_success "
                   "admission_rejections soft_steps answer_tokens full_logits_fetch slow_reader_cancels thinking_tokens thinking_end "
                   "collective_timeouts http_requests",
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info build_info ranks_alive "
                 "load_progress_ratio weights_load_seconds requests_by_phase kv_pages memory_bytes process_start_time_seconds "
                 "process_resident_memory_bytes",
    }
    for kind, names in expected.items():
        assert {n: kinds.get(n) for n in names.split()} == dict.fromkeys(names.split(), kind)
    for name, family in families.items():
        if name.startswith("sfumato:"):
            assert family.documentation and all(s.labels["model_name"] == "tiny" for s in family.samples), name


def test_totals_are_the_sum_of_usage(server, questions):
    before, prompt, generated, thought = scrape(server), 0, 0, 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for text in questions(20):
            usage = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]}).json()["usage"]
            prompt += usage["prompt_tokens"]
            generated += usage["completion_tokens"]
            thought += usage["completion_tokens_details"]["reasoning_tokens"]
    after = scrape(server)
    grown = lambda name: value(after, name) - value(before, name)  # noqa: E731
    assert (grown("prompt_tokens_total"), grown("generation_tokens_total"), grown("thinking_tokens_total")) == (prompt, generated, thought)
    assert grown("e2e_request_latency_seconds_count") == grown("request_success_total") == 20
