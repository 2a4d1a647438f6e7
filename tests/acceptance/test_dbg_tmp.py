import asyncio, time, collections, subprocess, sys, os
sys.path.insert(0,'/work/main')
import tests.acceptance.test_strategy as t
from tests.conftest import *
from tests.faults import Server
from quantplane import Client
from quantplane import v1 as pb

async def test_it(dsn, redis_url):
    t.PATIENCE_S = 15
    wanted = t.expected_signals()
    server = Server(dsn, redis_url, {"maintenance_s": 3600})
    try:
        await server.start()
        with t.desk(server) as run:
            async with Client(server.target) as client:
                async def say():
                    t0=time.monotonic()
                    while True:
                        await asyncio.sleep(1)
                        try:
                            r=await client.order.ListOrders(pb.ListOrdersRequest(page_size=10000), timeout=3)
                            c=collections.Counter(pb.OrderStatus.Name(o.status)[13:] for o in r.orders)
                            print(f"{time.monotonic()-t0:.1f}", dict(c), flush=True)
                        except Exception as e: print(f"{time.monotonic()-t0:.1f}", 'ERR', repr(e)[:150], flush=True)
                s=asyncio.create_task(say())
                orig=t.Desk.restart
                T0=time.monotonic()
                async def rst(self, what):
                    print('KILL',what, f'{time.monotonic()-T0:.1f}', flush=True); await orig(self,what); print('UP', f'{time.monotonic()-T0:.1f}',flush=True)
                t.Desk.restart=rst
                await t.publish(client, run, {1000:'strategy',1500:'server',2200:'broker',2800:'server',3200:'broker',3800:'strategy'})
                print('published', flush=True)
                try:
                    await t.all_filled(client, len(wanted))
                except AssertionError as e:
                    print(str(e)[:100])
                    for p in (run.broker._process.pid, run.strategy._process.pid, server.process.pid):
                        print(p, subprocess.run(['ps','-o','pid,stat,time,args','-p',str(p)],capture_output=True,text=True).stdout)
                    import asyncpg, pathlib
                    conn=await asyncpg.connect(dsn)
                    times=await conn.fetch('SELECT time FROM market_data ORDER BY time')
                    have={r['time'] for r in times}
                    miss=[i for i,x in enumerate(t.ticks()) if x.time not in have]
                    print('ROWS', len(times), 'missing', len(miss), miss[:3], miss[-3:])
                    n=[]
                    req=pb.StreamQuotesRequest(symbols=['EURUSD'],delivery=pb.DELIVERY_LOSSLESS)
                    req.start_time.CopyFrom(t.stamp(t.ticks()[0].time))
                    async def rd():
                        async for r in client.follow(client.market_data.StreamQuotes, req):
                            if r.event.WhichOneof('event'): print('EV', str(r.event).replace(chr(10),' ')[:200])
                            n.extend(q.time.ToNanoseconds() for q in r.quotes)
                    try:
                        async with asyncio.timeout(6): await rd()
                    except TimeoutError: pass
                    print('STREAM', len(n), len(set(n)), n==sorted(n))
                s.cancel()
    finally:
        await server.close()
