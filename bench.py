import sys,time,torch
torch.set_num_threads(1)
import ipo,data,model
from lab import rollout
args=ipo.parse(["--data","/work/shared/data/polite_pairs.jsonl","--tokenizer",sys.argv[1],"--n_layer",sys.argv[2],"--n_embd",sys.argv[3]])
src=ipo.FileSource(args)
torch.manual_seed(0)
p=model.GPT(model.GPTConfig(*src.sizes,args.n_layer,args.n_head,args.n_embd))
rows=src.pairs.chosen[src.train][:4]
prompts=[src.pairs.prompt_ids(r) for r in rows.repeat_interleave(8)]
print([len(x) for x in prompts[::8]])
lens=src.pairs.start.diff()-src.pairs.prompt_len
print("responses", lens.float().quantile(torch.tensor([.1,.5,.9])).tolist(), "prompts", src.pairs.prompt_len.float().quantile(torch.tensor([.1,.5,.9])).tolist())
g=torch.Generator().manual_seed(0)
for _ in range(2):
    t=time.time(); tk,m=rollout.sample(p,prompts,src.tokenizer.eot_token,64,g); print("sample",time.time()-t, m.sum(1).float().mean())
t=time.time(); l=ipo.sequence_logp(p,tk,m); print("logp",time.time()-t); l.sum().backward(); print("+bw",time.time()-t)
old=p.hidden
p.hidden=lambda tokens,wanted=None: old(tokens)
t=time.time(); rollout.sample(p,prompts,src.tokenizer.eot_token,64,g); print("without sharing",time.time()-t)
