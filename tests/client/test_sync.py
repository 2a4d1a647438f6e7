import signal
import sys
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from quantplane import reason_of
from quantplane import v1 as pb
from quantplane.sync import Client
from tests.client import status

SUBSCRIBE = pb.SubscribeQuotesRequest(symbols=["ES"])
STREAM = pb.StreamQuotesRequest(symbols=["ES"])
LATEST = pb.GetLatestQuotesRequest(symbols=["ES"])


def quote(last, token=b""):
    quotes = [pb.Quote(symbol="ES", last=last)]
    return pb.SubscribeQuotesResponse(quotes=quotes, resume_token=token)


class Server(pb.MarketDataServiceServicer):
    """Answers each method by the one function given for it."""

    def __init__(self, **methods):
        for name in pb.MarketDataServiceServicer.__dict__:
            if name[0].isupper():
                setattr(self, name, methods.get(name))


@contextmanager
def serving(**methods):
    """Serve from threads; give a client."""
    server = grpc.server(futures.ThreadPoolExecutor())
    pb.add_MarketDataServiceServicer_to_server(Server(**methods), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        server.stop(0).wait()


def refuse(context, code, reason):
    details = (("grpc-status-details-bin", status(reason, (), {})),)
    context.set_trailing_metadata(details)
    context.abort(code, "refused")


def test_a_unary_method_returns_its_response():
    response = pb.GetLatestQuotesResponse(unknown_symbols=["ES"])
    with serving(GetLatestQuotes=lambda request, context: response) as client:
        assert client.market_data.GetLatestQuotes(LATEST, timeout=5) == response


def test_an_error_is_raised_with_its_reason():
    def refuses(request, context):
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")

    with serving(GetLatestQuotes=refuses) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.market_data.GetLatestQuotes(LATEST)
    assert reason_of(caught.value) == "INVALID_FIELD"


def test_a_stream_is_not_called_directly():
    with serving() as client:
        with pytest.raises(TypeError, match="follow"):
            client.market_data.SubscribeQuotes(SUBSCRIBE)


def test_a_followed_stream_is_resumed():
    def script(request, context):
        if request.resume_token == b"t":
            yield quote(2)
        yield quote(1, b"t")
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    with serving(SubscribeQuotes=script) as client:
        method = client.market_data.SubscribeQuotes
        with client.follow(method, SUBSCRIBE) as follower:
            assert next(follower).quotes[0].last == 1
            assert next(follower).quotes[0].last == 2
            assert follower.reconnects == 1


def test_a_finite_stream_ends():
    complete = pb.StreamEvent(complete=pb.Complete())
    bars = pb.StreamBarsResponse(columns=pb.BarColumns(symbol="ES"))

    def script(request, context):
        yield bars
        yield pb.StreamBarsResponse(event=complete)

    with serving(StreamBars=script) as client:
        method = client.market_data.StreamBars
        request = pb.StreamBarsRequest(symbols=["ES"])
        assert list(client.follow(method, request)) == [bars]


def test_symbols_can_be_changed():
    def script(requests, context):
        next(requests)
        yield pb.StreamQuotesResponse(quotes=quote(1).quotes)
        added = next(requests).add_symbols[0]
        yield pb.StreamQuotesResponse(quotes=[pb.Quote(symbol=added)])

    with serving(StreamQuotes=script) as client:
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        next(follower)
        follower.update(add_symbols=["NQ"])
        assert next(follower).quotes[0].symbol == "NQ"


def test_quotes_are_published():
    received = []

    def script(requests, context):
        received.append(next(requests))
        yield pb.PublishQuotesResponse(next_batch=1)
        for request in requests:
            received.append(request)
            yield pb.PublishQuotesResponse(
                accepted_through=request.batch, durable_through=request.batch
            )

    quotes = [pb.Quote(symbol="ES", last=1)]
    with serving(PublishQuotes=script) as client:
        with client.publish_quotes("nyse") as publisher:
            assert publisher.send(quotes) == 1
            publisher.flush()
            publisher.durable()
            assert (publisher.accepted_through, publisher.durable_through) == (1, 1)
    first, batch = received
    assert first == pb.PublishQuotesRequest(feed="nyse")
    assert (batch.batch, list(batch.quotes)) == (1, quotes)


def test_a_publisher_raises_what_the_server_refuses():
    def script(requests, context):
        refuse(context, grpc.StatusCode.ABORTED, "FEED_REPLACED")
        yield

    with serving(PublishQuotes=script) as client:
        with pytest.raises(grpc.RpcError) as caught:
            with client.publish_quotes("nyse") as publisher:
                publisher.send([pb.Quote(symbol="ES")])
    assert reason_of(caught.value) == "FEED_REPLACED"


def test_closing_the_client_ends_the_iteration_of_another_thread():
    waits = threading.Event()

    def script(requests, context):
        next(requests)
        yield pb.StreamQuotesResponse(sequence=1)
        next(requests)  # the acknowledgement: the client waits for a response
        waits.set()
        next(requests)

    request = pb.StreamQuotesRequest(symbols=["ES"], max_unacknowledged=1)
    with serving(StreamQuotes=script) as client:
        follower = client.follow(client.market_data.StreamQuotes, request)
        rest = futures.Future()
        threading.Thread(target=lambda: rest.set_result(list(follower))).start()
        waits.wait()
        client.close()
        assert len(rest.result(timeout=5)) == 1


def test_closing_twice_is_closing_once():
    with serving() as client:
        client.close()


def test_a_closed_client_says_so():
    with serving() as client:
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.market_data.GetLatestQuotes(LATEST)


@pytest.fixture
def ctrl_c():
    """Have Ctrl-C raise KeyboardInterrupt, also in a background job's tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_main_thread():
    """Press Ctrl-C as soon as the main thread waits."""
    main = threading.main_thread().ident
    while sys._current_frames()[main].f_code.co_name != "wait":
        time.sleep(0.001)
    signal.pthread_kill(main, signal.SIGINT)


def test_ctrl_c_interrupts_waiting_for_a_response_and_ends_the_call(ctrl_c):
    ended = threading.Event()

    def script(requests, context):
        context.add_callback(ended.set)
        next(requests)
        yield pb.StreamQuotesResponse(sequence=1)
        next(requests)  # the acknowledgement: the next response is asked for
        interrupt_main_thread()
        next(requests)

    request = pb.StreamQuotesRequest(symbols=["ES"], max_unacknowledged=1)
    with serving(StreamQuotes=script) as client:
        follower = client.follow(client.market_data.StreamQuotes, request)
        next(follower)
        with pytest.raises(KeyboardInterrupt):
            next(follower)
        assert ended.wait(timeout=5)
